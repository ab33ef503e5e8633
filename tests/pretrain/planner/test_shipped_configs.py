"""Every shipped model and published recipe planned on 32 GPUs of the shipped cluster."""

import math

import pytest

from pretrain.planner.estimate import Planner
from pretrain.planner.hardware import load_hardware
from pretrain.planner.planned_run import choose_checkpointing, load_planned
from tests.helpers.processes import ROOT

MODELS = sorted((ROOT / "configs/models").glob("*/*.yaml"))
RECIPES = sorted((ROOT / "configs/runs/published").glob("*.yaml"))


def planner_of(path):
    config = load_planned(str(path), [])
    assert config.model.vocab_size is not None
    return Planner(config, config.model.vocab_size, load_hardware("h100"))


def check(estimate, hardware):
    assert estimate.peak_memory <= hardware.memory_bytes
    assert 0 < estimate.mfu < 0.75 and math.isfinite(estimate.step_seconds)
    assert all(seconds >= 0 for seconds in estimate.seconds.values())


def test_there_are_files():
    assert len(MODELS) > 50 and len(RECIPES) >= 10


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_models_fit_with_the_settings_that_are_assumed(path):
    planner = planner_of(path)
    choose_checkpointing(planner, 32)
    check(planner.estimate(planner.config.parallel, 32), planner.hardware)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_fit_with_their_own_settings(path):
    planner = planner_of(path)
    check(planner.estimate(planner.config.parallel, 32), planner.hardware)
