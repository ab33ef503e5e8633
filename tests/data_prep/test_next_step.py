"""What the command says comes next: true for the data set that was made."""

import shutil
from pathlib import Path

import pytest

from data_prep.next_step import next_step
from pretrain.data.manifest import Manifest
from tests.helpers.data_preparation import REPOSITORY, run_command, write_config


@pytest.fixture
def configs(tmp_path):
    """A tree of configs as this project keeps them, and where its data config lies."""
    runs, data = tmp_path / "configs" / "runs", tmp_path / "configs" / "data"
    for folder in (runs / "published", data):
        folder.mkdir(parents=True)
    (runs / "base.yaml").write_text(f"data: {{path: {tmp_path / 'one'}}}\n")
    (runs / "child.yaml").write_text(f"extends: base.yaml\ndata: {{path: {tmp_path}/x/../two}}\n")
    blend = f"[{{path: {tmp_path / 'three'}}}, {{path: {tmp_path / 'four'}, weight: 2}}]"
    (runs / "published" / "blend.yaml").write_text(f"data: {{blend: {blend}}}\n")
    (runs / "broken.yaml").write_text("data: [")
    (runs / "other.yaml").write_text("data: nothing\n")
    return data / "mine.yaml"


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("one", "base"),
        ("two", "child"),
        ("three", "published/blend"),
        ("four", "published/blend"),
        ("five", None),
    ],
)
def test_it_names_a_run_with_this_data_or_the_setting(configs, tmp_path, small_data, name, config):
    line = next_step(Manifest.load(small_data), tmp_path / name, configs)
    if config is not None:
        assert line == f"next: python -m pretrain {configs.parents[1] / 'runs' / config}.yaml"
    else:
        assert line.startswith(f"next: set data: {{path: {tmp_path / name}}} in a run's config")


def test_the_demos_data_is_followed_by_the_demo(small_data, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    manifest = Manifest.load(small_data)
    line = next_step(manifest, Path("data/stdlib"), Path("configs/data/stdlib.yaml"))
    assert line == "next: python -m pretrain configs/runs/demo.yaml"


def test_without_text_to_train_on_it_names_neither(tmp_path, text_folder, model_file):
    config = write_config(
        tmp_path / "mine.yaml",
        output=str(tmp_path / "out"),
        sources=[{"name": "text", "kind": "files", "paths": [str(text_folder / "000.txt")]}],
        tokenizer={"path": str(model_file)},
        validation_fraction=0.999999,
        processes=1,
    )
    result = run_command(config)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith("next: add documents")
    shutil.rmtree(tmp_path / "out")
    result = run_command(config, "validation_fraction=0")
    assert result.stdout.splitlines()[-1] == (
        f"next: set data: {{path: {tmp_path / 'out'}}} in a run's config, and "
        "python -m pretrain CONFIG"
    )
