import json

import pytest

from data_prep.config import SourceConfig
from data_prep.sources import open_source
from pretrain.common.errors import UserError

datasets = pytest.importorskip("datasets")

TEXTS = [f"document {i} é\n" for i in range(50)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


@pytest.fixture
def json_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("".join(json.dumps({"text": t, "id": 0}) + "\n" for t in TEXTS))
    return path


def source_of(dataset, **settings):
    return open_source(SourceConfig(name="h", kind="huggingface", dataset=dataset, **settings))


def contents(source, skip=0):
    return [document.content.decode() for document in source.read(0, skip)]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("builder", ["json", "parquet"])
def test_builders_over_local_files(tmp_path, json_file, builder, streaming):
    path = json_file
    if builder == "parquet":
        path = tmp_path / "a.parquet"
        datasets.Dataset.from_dict({"text": TEXTS, "id": [0] * 50}).to_parquet(path)
    source = source_of(builder, data_files=[str(path)], streaming=streaming)
    assert contents(source) == TEXTS
    assert contents(source, skip=7) == TEXTS[7:]
    assert source.sizes == (None if streaming else [50])


def test_a_saved_data_set_and_its_splits(tmp_path):
    part = datasets.Dataset.from_dict({"body": TEXTS})
    datasets.DatasetDict({"train": part, "other": part.select(range(3))}).save_to_disk(
        tmp_path / "saved"
    )
    source = source_of(str(tmp_path / "saved"), split="other", text_field="body")
    assert contents(source) == TEXTS[:3]


@pytest.mark.parametrize("streaming", [False, True])
def test_the_fingerprint_follows_the_files(json_file, streaming):
    def fingerprint():
        return source_of("json", data_files=[str(json_file)], streaming=streaming).fingerprint

    before = fingerprint()
    assert fingerprint() == before
    json_file.write_text(json_file.read_text() + '{"text": "more", "id": 0}\n')
    assert fingerprint() != before


@pytest.mark.parametrize("streaming", [False, True])
def test_a_missing_text_field_names_those_found(json_file, streaming):
    source = source_of("json", data_files=[str(json_file)], text_field="x", streaming=streaming)
    with pytest.raises(UserError, match=r"no text field 'x', found: .*text"):
        contents(source)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "nobody/nothing"},
        {"dataset": "json", "data_files": ["/nope/*.json"]},
        {"dataset": "json", "split": "nope"},
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(json_file, settings):
    settings = {"data_files": [str(json_file)], **settings}
    with pytest.raises(UserError, match="source 'h': datasets cannot read") as error:
        contents(source_of(**settings))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_corrupt_file_is_one_sentence(json_file, streaming):
    json_file.write_text('{"text": "a"}\n{"text": nope}\n')
    with pytest.raises(UserError, match="source 'h': datasets cannot read"):
        contents(source_of("json", data_files=[str(json_file)], streaming=streaming))
