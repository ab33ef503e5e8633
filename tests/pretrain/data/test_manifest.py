import errno
import json
import shutil

import pytest

from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.data.manifest import Manifest, content_hash


def test_it_is_saved_and_loaded_alike(tmp_path, small_data):
    manifest = Manifest.load(small_data)
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_every_field_of_the_format_is_there(small_data):
    values = json.loads((small_data / "manifest.json").read_text())
    assert values["format"] == 1
    assert set(values["tokenizer"]) >= {"file", "kind", "vocab_size", "eod_id", "sha256"}
    assert set(values["byte_entropy"]) == {"unigram", "bigram"}
    assert set(values["sources"][0]["splits"]["train"]) == {"documents", "tokens", "bytes"}
    assert set(values["shards"][0]["sha256"]) == {"bin", "idx"}
    assert values["content_sha256"] == content_hash(
        Manifest.load(small_data).shards, values["tokenizer"]["sha256"]
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, r"holds no manifest\.json: run python -m data_prep CONFIG first"),
        (b"{", "damaged, not valid JSON"),
        (b"\xff", "damaged, not valid JSON"),
        (b"[]", "format is None, this version reads format 1"),
        (b'{"format": 7}', "format is 7, this version reads format 1"),
        (b'{"format": 1}', "created must be set.*damaged or foreign"),
    ],
)
def test_what_is_no_manifest_is_one_sentence(tmp_path, content, words):
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=words):
        Manifest.load(tmp_path)


def test_sizes_tell_missing_and_cut_shards(tmp_path, small_data):
    data = shutil.copytree(small_data, tmp_path / "data")
    manifest = Manifest.load(data)
    manifest.verify_sizes(data)
    path = data / f"{manifest.shards[1].name}.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-2])
    with pytest.raises(UserError, match=f"{path.name} has {len(content) - 2} bytes, expected"):
        manifest.verify_sizes(data)
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        manifest.verify_sizes(data)


def test_hashes_tell_altered_shards_wherever_the_files_are_shared_out(tmp_path, small_data):
    data = shutil.copytree(small_data, tmp_path / "data")
    manifest = Manifest.load(data)
    assert manifest.damaged_files(data) == []
    altered = [data / f"{manifest.shards[0].name}.bin", data / f"{manifest.shards[-1].name}.idx"]
    for path in altered:
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    manifest.verify_sizes(data)  # the sizes tell nothing
    for parts in (1, 2, 3, 100):
        found = [x for part in range(parts) for x in manifest.damaged_files(data, part, parts)]
        assert sorted(x.split()[0] for x in found) == sorted(map(str, altered)), parts


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_bytes(path, b"old")

    def fail(descriptor):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
