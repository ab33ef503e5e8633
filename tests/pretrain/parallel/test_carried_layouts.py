"""Two processes whose rows carry states train the model that one trains."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
import torch

from tests.helpers import carried_worker
from tests.helpers.processes import run_on

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("processes")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("carried")
    run_on(2, carried_worker.__name__, path)
    return path


@pytest.fixture(scope="module")
def two_processes(folder):
    return json.loads((folder / "found.json").read_text())


@cache
def train(model, noise):
    return carried_worker.train(model, carried_worker.ALONE, noise)


@pytest.mark.parametrize(("model", "layout"), carried_worker.CASES)
def test_two_processes_equal_one(model, layout, two_processes):
    expected = train(model, carried_worker.NOISE.get(layout, 0.0))
    assert np.allclose(two_processes[f"{model}-{layout}"], expected, rtol=1e-5)


@pytest.mark.parametrize(("model", "layout"), carried_worker.EXACT)
def test_segments_have_the_gradients_of_whole_rows(model, layout, folder):
    found = torch.load(folder / "exact.pt")[f"{model}-{layout}"]
    expected = carried_worker.gradients(model, carried_worker.ALONE)
    assert (found - expected).abs().max() <= 1e-10 * expected[:, 1:].abs().max()


@pytest.mark.parametrize("layout", carried_worker.RESUMED)
def test_runs_resume_bit_for_bit(layout, two_processes):
    assert two_processes[f"resumed-{layout}"] == two_processes[f"hybrid-{layout}"]


def test_states_cross_from_layout_to_layout(folder, two_processes):
    engine = carried_worker.make("hybrid", carried_worker.ALONE, 0.3)
    steps = range(len(carried_worker.ACROSS) + 1)
    expected = [carried_worker.step_of(engine, step, carried_worker.ALONE) for step in steps]
    assert np.allclose(two_processes["across"], expected[:-1], rtol=1e-5)
    _, last = carried_worker.resume(folder, steps[-1], carried_worker.ALONE)
    assert np.allclose(last, expected[-1], rtol=1e-5)


def test_noise_shows():
    without, with_noise = train("hybrid", 0.0), train("hybrid", 0.3)
    assert without[0] == with_noise[0]
    assert abs(without[1][0] / with_noise[1][0] - 1) > 1e-4
