"""Configs that come with the package are found from any folder, after the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.common.config_files import load_values
from pretrain.common.config_loader import ConfigError
from pretrain.common.shipped_configs import SHIPPED, find_config

DEMO = Path("configs/runs/demo.yaml")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_every_folder_of_configs_is_shipped():
    root = Path(__file__).parents[3] / "configs"
    assert {p.name for p in SHIPPED.iterdir()} == {p.name for p in root.iterdir()}


def test_a_file_of_the_user_comes_first(tmp_path):
    assert find_config(DEMO) == SHIPPED / "runs/demo.yaml"
    (tmp_path / DEMO).parent.mkdir(parents=True)
    (tmp_path / DEMO).write_text("name: mine")
    assert load_values(DEMO) == {"name": "mine"}


def test_a_name_stands_for_a_file_of_its_folder(tmp_path):
    assert find_config("h100", "hardware") == SHIPPED / "hardware/h100.yaml"
    (tmp_path / "h100").write_text("name: mine")
    assert find_config("h100", "hardware") == Path("h100")
    assert find_config("demo") == Path("demo"), "no folder is given"


@pytest.mark.parametrize("folder", [".", "mine", "mine/runs"])
def test_a_config_extends_a_shipped_one_from_anywhere(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / "run.yaml"
    path.write_text(f"extends: {DEMO}\nname: mine\n")
    values = load_values(path)
    assert values == {**load_values(DEMO), "name": "mine"}


@pytest.mark.parametrize("path", ["configs/runs/none.yaml", "runs/demo.yaml", "demo.yaml"])
def test_what_neither_has_is_named_as_it_was_given(path):
    with pytest.raises(ConfigError, match=f"no config file at {path}"):
        load_values(path)
