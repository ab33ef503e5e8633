"""Two processes whose rows come in segments train the model that one trains without."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from pretrain.config import ParallelConfig
from tests.helpers import segments_worker
from tests.helpers.processes import run_on

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("segments") / "found.json"
    run_on(2, segments_worker.__name__, path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@cache
def train(model, segment_tokens):
    return segments_worker.train(model, ParallelConfig(), segment_tokens)


@pytest.mark.parametrize(("model", "layout"), segments_worker.CASES)
def test_two_processes_equal_one(model, layout, two_processes):
    *steps, valid = two_processes[f"{model}-{layout}"]
    *expected, expected_valid = train(model, None)
    assert np.allclose(steps, expected, rtol=1e-5)
    assert np.allclose(valid, expected_valid, rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "size"),
    [("tied", 16), ("tied", 2), ("untied", 8), ("options", 16), ("experts", 8), ("lengths", 8)],
)
def test_steps_equal_those_without_segments(model, size):
    *steps, valid = train(model, size)
    *expected, expected_valid = train(model, None)
    assert np.allclose(steps, expected, rtol=1e-5)
    assert np.allclose(valid, expected_valid, rtol=1e-5)
