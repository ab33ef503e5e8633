import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.config import SourceConfig
from data_prep.source_kinds.files import find_files
from data_prep.source_kinds.stdlib import StandardLibrary
from data_prep.sources import open_source
from pretrain.common.errors import UserError

TEXTS = ["one", "two\nlines", "", "drei é 🙂", "x" * 300_000, "last"]


def rows(texts=TEXTS):
    return b"".join(json.dumps({"text": text, "id": 1}).encode() + b"\n" for text in texts)


def write(folder, kind):
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(rows())
    elif kind == "jsonl.zst":
        # Two frames, as `cat a.zst b.zst` makes them, cut in the middle of a line.
        half = len(rows()) // 2
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(rows()[:half]) + compress(rows()[half:]))
    else:
        pq.write_table(pa.table({"id": [1] * len(TEXTS), "text": TEXTS}), path, row_group_size=2)
    return path


def source_of(*paths, **settings):
    config = SourceConfig(name="a", kind="files", paths=[str(p) for p in paths], **settings)
    return open_source(config)


def contents(source, file=0, skip=0):
    return [document.content for document in source.read(file, skip)]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_rows_are_documents_from_any_position_on(tmp_path, kind):
    source = source_of(write(tmp_path, kind))
    expected = [text.encode() for text in TEXTS]
    for skip in range(len(TEXTS) + 1):
        assert contents(source, skip=skip) == expected[skip:]
    assert [d.consumed for d in source.read(0)][-1] == source.sizes[0]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.zst", "parquet"])
def test_a_missing_text_field_names_those_found(tmp_path, kind):
    source = source_of(write(tmp_path, kind), text_field="body")
    with pytest.raises(UserError, match=r"a\..*no text field 'body', found: .*text"):
        contents(source)


@pytest.mark.parametrize("kind", ["txt", "md", "py"])
def test_a_plain_file_is_one_document_byte_for_byte(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xff")
    assert contents(source_of(path)) == [b"\xef\xbb\xbfa\r\n\xff"]
    assert contents(source_of(path), skip=1) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.text("ab\n", max_size=9), min_size=1), block=st.integers(1, 40))
@pytest.mark.parametrize("separator", ["<|endoftext|>", "\n\n", "\n---\n"])
def test_a_separator_divides_text_files(tmp_path, monkeypatch, separator, parts, block):
    monkeypatch.setattr("data_prep.source_kinds.files._READ_BYTES", block)
    content = separator.join(parts).encode() or b"a"
    (tmp_path / "a.txt").write_bytes(content)
    source = source_of(tmp_path / "a.txt", options={"separator": separator})
    expected = content.split(separator.encode())
    if not expected[-1]:
        expected.pop()
    for skip in range(len(expected) + 1):
        assert contents(source, skip=skip) == expected[skip:]
    assert [d.consumed for d in source.read(0)][-1:] in ([], [len(content)])


def test_an_empty_separator_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"options.separator is empty, expected the text between"):
        source_of(tmp_path / "a.txt", options={"separator": ""})


def test_a_long_text_file_is_said_to_be_one_document(tmp_path):
    for name, size in (("a.txt", 5_000_000), ("b.md", 4_000_001), ("c.txt", 9), ("d.jsonl", 10**7)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    remark = source_of(tmp_path).remark()
    assert "a.txt (5.0 MB) and 1 more are one document each" in remark
    assert "a.txt (5.0 MB) is one document, as" in source_of(tmp_path / "a.txt").remark()
    assert 'options: {separator: "\\n\\n"}' in remark
    assert source_of(tmp_path / "c.txt", tmp_path / "d.jsonl").remark() is None
    assert source_of(tmp_path, options={"separator": "\n\n"}).remark() is None


def test_lines_that_are_not_utf8_are_left_to_be_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n{"text": "\\ud800"}\n\n{"text": null}\n{"text": "a"}')
    found = contents(source_of(path))
    for content in found[:2]:
        with pytest.raises(UnicodeDecodeError):
            content.decode()
    assert found[2:] == [b"", b"", b"a"]


def test_parquet_text_that_is_not_utf8_is_left_to_be_counted(tmp_path):
    column = pa.array([b"\xff", b"fine"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert contents(source_of(tmp_path)) == [b"\xff", b"fine"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{nope", "line 2: not valid JSON"),
        (b"[1]", "line 2: expected a JSON object"),
        (b'{"text": 3}', "line 2: field 'text' is 3, expected text"),
        (b'{"text": ' + b"[" * 100_000, "line 2: not valid JSON"),
        (b'{"text": ' + b"9" * 5_000 + b"}", "line 2: not valid JSON"),
    ],
)
def test_broken_lines_are_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\n' + line + b"\n")
    with pytest.raises(UserError, match=words):
        contents(source_of(tmp_path))


@pytest.mark.parametrize("damage", ["cut", "flip", "no zstandard"])
def test_damaged_zstandard_files_are_named(tmp_path, damage):
    path = write(tmp_path, "jsonl.zst")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-5:]
    elif damage == "flip":
        content[:8] = b"\x28\xb5\x2f\xfd\xff\xff\xff\xff"
    else:
        content = bytearray(b"plain text")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: damaged zstandard file"):
        contents(source_of(path))


@pytest.mark.parametrize("damage", ["cut", "page", "no parquet"])
def test_damaged_parquet_files_are_named(tmp_path, damage):
    path = write(tmp_path, "parquet")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-100:]
    elif damage == "page":
        content[4:200] = bytes(196)
    else:
        content = bytearray(b"plain text")
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.parquet: .*parquet file"):
        contents(source_of(path))


def test_parquet_columns_that_are_no_text_are_named(tmp_path):
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="field 'text' is int64, expected text"):
        contents(source_of(tmp_path))


def test_folders_and_globs_find_the_same_files_in_order(tmp_path, monkeypatch):
    for name in ("b/2.txt", "b/10.txt", "a.jsonl", "b/.hidden.txt", ".git/x.txt", "c.docx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    expected = ["a.jsonl", "b/10.txt", "b/2.txt"]
    monkeypatch.chdir(tmp_path)
    for paths in (["."], ["**/*"], ["a.jsonl", "b"], ["b", "b/*.txt", "*.jsonl"]):
        config = SourceConfig(name="a", kind="files", paths=paths)
        assert [p.as_posix() for p in find_files(config)] == expected
    absolute = SourceConfig(name="a", kind="files", paths=[f"{tmp_path}/**/*"])
    assert [p.relative_to(tmp_path).as_posix() for p in find_files(absolute)] == expected


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nope", "no file or folder at"),
        ("*.nope", "holds no .txt"),
        ("empty", "holds no .txt"),
        ("a.docx", "cannot read this kind of file"),
        ("zero.txt", "files are empty"),
    ],
)
def test_missing_and_empty_sources_are_named(tmp_path, path, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.docx").write_text("x")
    (tmp_path / "zero.txt").touch()
    with pytest.raises(UserError, match=words):
        source_of(tmp_path / path)


def test_the_fingerprint_follows_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("a")
    before = source_of(tmp_path).fingerprint
    assert source_of(tmp_path).fingerprint == before
    path.write_text("ab")
    after = source_of(tmp_path).fingerprint
    assert after != before
    (tmp_path / "b.txt").write_text("b")
    assert source_of(tmp_path).fingerprint not in (before, after)


def test_the_standard_library_is_its_sources_without_tests():
    source = StandardLibrary(SourceConfig(name="stdlib", kind="stdlib"))
    names = [path.relative_to(source.root).as_posix() for path in source.paths]
    assert {"abc.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert names == sorted(names)
    assert not [n for n in names if "site-packages/" in n or "tests/" in n or n.startswith("test/")]
    assert sum(source.sizes) > 8e6
    assert open_source(source.config).fingerprint == source.fingerprint


def test_parts_of_the_standard_library_are_named_by_globs():
    def part(*files):
        options = {"files": list(files)}
        return StandardLibrary(SourceConfig(name="part", kind="stdlib", options=options))

    everything = set(StandardLibrary(SourceConfig(name="stdlib", kind="stdlib")).paths)
    modules, packages = part("*.py"), part("*/**/*.py")
    assert {p.parent for p in modules.paths} == {modules.root}
    assert set(modules.paths) | set(packages.paths) == everything
    assert not set(modules.paths) & set(packages.paths)
    assert part("json/*.py", "json/decoder.py").fingerprint == part("json/*.py").fingerprint
    for glob, message in (
        ("json", "options.files has 'json', expected globs of Python files within the library"),
        ("/json/*.py", "options.files has '/json/"),
        ("nothing/*.py", "no Python sources in .* match nothing/"),
    ):
        with pytest.raises(UserError, match=message):
            part(glob)
