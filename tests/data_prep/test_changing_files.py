"""Files that change while they are read, and settings that change afterwards: both are said."""

import json
import os
import re

import pytest

from data_prep import prepare as preparing
from data_prep.prepare import prepare
from pretrain.common.errors import UserError
from pretrain.data.manifest import Manifest
from tests.helpers.data_preparation import digests, files_config


def append(path):
    with path.open("a") as file:
        file.write(json.dumps({"text": "more"}) + "\n")


def touch(path):
    os.utime(path, ns=(1, 1))


def replace(path):
    path.with_suffix(".new").write_text(path.read_text().replace("row", "line"))
    path.with_suffix(".new").replace(path)


def folder_of_rows(folder):
    folder.mkdir()
    for name in ("a", "b", "c"):
        rows = [json.dumps({"text": f"row {i} of {name}\n" * 20}) for i in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def after(monkeypatch):
    """Have something happen when the text has been read, or before it is."""

    def happening(change, when):
        write = preparing.write_shards

        def changed(*arguments, **options):
            if when == "before":
                change()
            write(*arguments, **options)
            if when == "after":
                change()

        monkeypatch.setattr(preparing, "write_shards", changed)

    return happening


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", [append, touch, replace])
def test_a_file_that_changes_meanwhile_is_named(tmp_path, model_file, after, change, when, capsys):
    folder = folder_of_rows(tmp_path / "rows")
    after(lambda: change(folder / "b.jsonl"), when)
    manifest = prepare(files_config(tmp_path / "out", [folder], model_file))
    words = r"source 'text': .*b\.jsonl changed while the data was made.*--overwrite"
    assert re.search(words, capsys.readouterr().out)
    assert re.fullmatch(words, Manifest.load(tmp_path / "out").warnings[-1])
    assert manifest.warnings == Manifest.load(tmp_path / "out").warnings


def test_a_file_that_breaks_meanwhile_is_said_to_have_changed(tmp_path, model_file, after):
    folder = folder_of_rows(tmp_path / "rows")
    after(lambda: (folder / "c.jsonl").write_text('{"text": "cut'), "before")
    with pytest.raises(UserError, match=r"c.jsonl, line 1: not valid JSON.*c.jsonl changed while"):
        prepare(files_config(tmp_path / "out", [folder], model_file))


def test_several_changed_files_are_counted(tmp_path, model_file, after, capsys):
    folder = folder_of_rows(tmp_path / "rows")
    after(lambda: [append(path) for path in folder.iterdir()], "after")
    prepare(files_config(tmp_path / "out", [folder], model_file))
    assert re.search(r"a.jsonl and 2 more changed while", capsys.readouterr().out)


def test_files_that_stay_are_no_news(tmp_path, model_file):
    folder = folder_of_rows(tmp_path / "rows")
    manifest = prepare(files_config(tmp_path / "out", [folder], model_file))
    assert not any("changed" in warning for warning in manifest.warnings)


@pytest.mark.parametrize("streaming", [False, True])
def test_local_files_of_a_hugging_face_source_are_watched(
    tmp_path, model_file, after, streaming, monkeypatch
):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = folder_of_rows(tmp_path / "rows")
    files = [str(folder / "a.jsonl"), str(folder / "b.jsonl")]
    source = {"name": "text", "kind": "huggingface", "dataset": "json", "data_files": files}
    after(lambda: append(folder / "b.jsonl"), "after")
    config = files_config(
        tmp_path / "out", [], model_file, sources=[{**source, "streaming": streaming}]
    )
    assert re.search(r"b\.jsonl changed while", prepare(config).warnings[-1])


def test_a_weight_alone_is_the_runs_to_change(tmp_path, text_folder, model_file):
    texts = {"name": "text", "kind": "files", "paths": [str(text_folder)]}
    sources = [{**texts, "name": name, "max_documents": 9} for name in ("one", "two")]
    output = tmp_path / "out"
    prepare(files_config(output, [], model_file, sources=sources))
    before = digests(output)
    sources[1]["weight"] = 3
    words = r"sources.1.weight was 1.0, now is 3.0\): a run can have weights of its own, "
    words += r"data: \{path: .*out, weights: \{two: 3.0\}\}, and nothing is tokenized again; or"
    with pytest.raises(UserError, match=words):
        prepare(files_config(output, [], model_file, sources=sources))
    sources[1]["max_documents"] = 5
    with pytest.raises(UserError, match=r"now is 5.*: choose another output, or replace it"):
        prepare(files_config(output, [], model_file, sources=sources))
    assert digests(output) == before
