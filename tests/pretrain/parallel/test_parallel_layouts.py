"""Four processes, under every layout, train the model that one process trains."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from pretrain.config import ParallelConfig
from tests.helpers import parallel_worker
from tests.helpers.parallel_worker import ACROSS, CASES, STEPS
from tests.helpers.processes import run_on

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]

# Relative; Muon orthogonalises in bf16.
TOLERANCE = {
    "bf16": 2e-2,
    "tables-bf16": 2e-2,
    "fp8": 2e-2,
    "fp8-selective": 2e-2,
    "muon": 2e-4,
    "muon-bf16": 2e-2,
    "muon-experts": 2e-4,
}
FLOAT32 = 1e-5


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    run_on(4, parallel_worker.__name__, folder)
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@cache
def one_process(model, backend, rows):
    return parallel_worker.train(model, _alone(model, backend), rows)


def _alone(model, backend="megatron"):
    """One process's layout, with the same optimizer."""
    zero_stage = 0 if model.startswith("muon") else 1
    return ParallelConfig(zero_stage=zero_stage, zero_backend=backend)


@pytest.mark.parametrize("name", CASES)
def test_every_layout_equals_one_process(name, four_processes):
    model, layout = CASES[name]
    *steps, valid = four_processes[name]
    # Only the options know an optimizer that DeepSpeed does not.
    deepspeed = model == "options" and layout.startswith("deepspeed")
    *expected, expected_valid = one_process(
        model,
        "deepspeed" if deepspeed else "megatron",
        parallel_worker.rows_of(parallel_worker.ALL_LAYOUTS[layout]),
    )
    assert len(steps) == STEPS
    tolerance = TOLERANCE.get(model, FLOAT32)
    assert np.allclose(steps, expected, rtol=tolerance)
    assert np.allclose(valid, expected_valid, rtol=tolerance)


@pytest.mark.parametrize("model", ["muon", "muon-bf16"])
def test_whole_matrices_dealt_out_are_updated_as_on_every_process(model, four_processes):
    dealt, replicated = four_processes[f"{model}-dp4"], four_processes[f"{model}-dp4-zero0"]
    for one, other in zip(dealt, replicated, strict=True):
        assert np.allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", ACROSS)
def test_checkpoints_load_under_every_other_layout(name, four_processes):
    model, layouts = ACROSS[name]
    rows = parallel_worker.ACROSS_ROWS
    engine = parallel_worker.make(model, _alone(model))
    expected = [parallel_worker.step_of(engine, step, rows) for step in range(len(layouts))]
    assert np.allclose(four_processes[name], expected, rtol=TOLERANCE.get(model, FLOAT32))
