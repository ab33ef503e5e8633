"""Four processes, under every layout, train the model that one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import ParallelConfig
from tests.pretrain import parallel_worker
from tests.pretrain.parallel_worker import ACROSS, CASES, STEPS

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]

TOLERANCE = (1e-5, 2e-2)  # relative: float32, bf16


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("layouts")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
         "-m", parallel_worker.__name__, str(folder)],
        capture_output=True, text=True, timeout=900, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@cache
def one_process(model):
    return parallel_worker.train(model, ParallelConfig())


@pytest.mark.parametrize("name", CASES)
def test_every_layout_equals_one_process(name, four_processes):
    model, _ = CASES[name]
    *steps, valid = four_processes[name]
    *expected, expected_valid = one_process(model)
    assert len(steps) == STEPS
    assert np.allclose(steps, expected, rtol=TOLERANCE[model == "bf16"])
    assert np.allclose(valid, expected_valid, rtol=TOLERANCE[model == "bf16"])


@pytest.mark.parametrize("name", ACROSS)
def test_checkpoints_load_under_every_other_layout(name, four_processes):
    model, layouts = ACROSS[name]
    engine = parallel_worker.make(model, ParallelConfig())
    expected = [parallel_worker.step_of(engine, step) for step in range(len(layouts))]
    assert np.allclose(four_processes[name], expected, rtol=TOLERANCE[model == "bf16"])
