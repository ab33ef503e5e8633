import pytest

from data_prep.config import load_data_config
from pretrain.common.config_loader import ConfigError
from tests.helpers.data_preparation import REPOSITORY, write_config

FILES = {"name": "a", "kind": "files", "paths": ["x"]}


def test_the_shipped_configs_are_valid():
    paths = sorted((REPOSITORY / "configs" / "data").glob("*.yaml"))
    assert paths
    for path in paths:
        load_data_config(path)


def test_overrides_reach_into_lists(tmp_path):
    path = write_config(tmp_path / "a.yaml", output="x", sources=[FILES])
    config = load_data_config(path, ["sources.0.weight=2", "tokenizer.kind=unigram"])
    assert config.sources[0].weight == 2.0
    assert config.sources[0].paths == ["x"]
    assert config.tokenizer.kind == "unigram"


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([], "sources is empty"),
        ([{**FILES, "paths": []}], r"sources\[0\]\.paths must be set"),
        ([{"name": "a", "kind": "huggingface"}], r"sources\[0\]\.dataset must be set"),
        ([FILES, FILES], "the name of another source too"),
        ([{**FILES, "name": "a/b"}], "becomes part of file names"),
        ([{**FILES, "split": "x"}], "split is only for kind huggingface, not files"),
        ([{"name": "a", "kind": "stdlib", "paths": ["x"]}], "paths is only for kind files"),
        ([{**FILES, "options": {"x": 1}}], r"options: unknown setting 'x'; known: separator"),
        (
            [{"name": "s", "kind": "huggingface", "dataset": "d", "options": {"x": 1}}],
            r"options is \{'x': 1\}, but huggingface has none",
        ),
        (
            [{"name": "s", "kind": "stdlib", "options": {"file": []}}],
            r"options: unknown setting 'file' \(did you mean 'files'\?\)",
        ),
        ([{**FILES, "weight": 0}], "weight is 0.0, expected more than 0"),
        ([{**FILES, "wieght": 1}], r"unknown setting 'sources\[0\]\.wieght'.*'weight'"),
        ([{**FILES, "kind": "file"}], "did you mean 'files'"),
    ],
)
def test_impossible_sources_are_named(tmp_path, sources, words):
    path = write_config(tmp_path / "a.yaml", output="x", sources=sources)
    with pytest.raises(ConfigError, match=words):
        load_data_config(path)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("validation_fraction=1", "validation_fraction is 1.0, expected less than 1"),
        ("shard_bytes=0", "shard_bytes is 0, expected at least 1000"),
        ("processes=0", "processes is 0, expected at least 1"),
        ("tokenizer.kind=wordpiece", "tokenizer.kind is 'wordpiece'"),
        ("tokenizer.vocab=3", r"unknown setting 'tokenizer\.vocab' \(did you mean 'vocab_size'"),
        ("sources.1.weight=3", r"override 'sources\.1\.weight=3'"),
        ("seed", "expected key=value"),
        ("seed=[1", r"override 'seed=\[1'"),
    ],
)
def test_impossible_overrides_are_named(tmp_path, override, words):
    path = write_config(tmp_path / "a.yaml", output="x", sources=[FILES])
    with pytest.raises(ConfigError, match=words):
        load_data_config(path, [override])
