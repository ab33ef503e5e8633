"""Four processes that share rows train the model that one process trains."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from pretrain.checkpoint.state import load_weights
from pretrain.config import ParallelConfig
from pretrain.run_directory import find_checkpoint
from pretrain.training.verify import largest_difference
from tests.helpers import context_worker
from tests.helpers.context_worker import ACROSS, CASES, STEPS
from tests.helpers.processes import run_on

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]

MUON, FLOAT32 = 2e-4, 1e-5  # relative; Muon orthogonalises in bf16
WEIGHTS = 2e-5  # relative, as verify compares them: Adam makes tiny gradients' rounding large


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("context")
    run_on(4, context_worker.__name__, folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return {**found, "folder": folder}


@cache
def one_process(model):
    return context_worker.train(model, ParallelConfig(zero_stage=0))


@pytest.mark.parametrize("name", CASES)
def test_every_layout_equals_one_process(name, four_processes):
    model, _ = CASES[name]
    *steps, valid, score = four_processes[name]
    *expected, expected_valid, expected_score = one_process(model)
    assert len(steps) == STEPS
    assert valid[1:] == list(expected_valid[1:])
    tolerance = MUON if model == "muon" else FLOAT32
    assert np.allclose(steps, expected, rtol=tolerance)
    assert np.isclose(valid[0], expected_valid[0], rtol=tolerance)
    assert np.isclose(score, expected_score, rtol=tolerance)


@pytest.mark.parametrize("model", ACROSS)
def test_checkpoints_load_under_every_other_layout(model, four_processes):
    engine = context_worker.make(model, ParallelConfig(zero_stage=0))
    expected = [context_worker.step_of(engine, step) for step in range(len(ACROSS[model]))]
    found = four_processes[f"across-{model}"]
    assert np.allclose(found, expected, rtol=MUON if model == "muon" else FLOAT32)


def test_weights_after_a_step_under_each_layout_are_those_of_one_process(four_processes):
    engine = context_worker.make("hybrid", ParallelConfig(zero_stage=0))
    for step in range(len(ACROSS["hybrid"])):
        context_worker.step_of(engine, step)
    trained = context_worker.make("hybrid", ParallelConfig(zero_stage=0), seed=1)
    load_weights(find_checkpoint(four_processes["folder"] / "hybrid"), trained.parts[0])
    found, expected = (
        {name: p.detach() for name, p in made.parts[0].named_parameters()}
        for made in (trained, engine)
    )
    assert largest_difference(expected, found, 1e-3 * len(ACROSS["hybrid"])) < WEIGHTS
