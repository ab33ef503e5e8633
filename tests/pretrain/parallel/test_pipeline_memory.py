"""Stages free the outputs that they have sent, none before it is sent, and train the same model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.config import ParallelConfig
from tests.helpers import pipeline_worker
from tests.helpers.pipeline_worker import LAYOUTS
from tests.helpers.processes import run_on

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("pipelines")
    run_on(2, pipeline_worker.__name__, folder)
    return {name: torch.load(folder / f"{name}.pt") for name in LAYOUTS}


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_are_those_of_one_process(name, two_processes):
    loss, expected = pipeline_worker.gradients(pipeline_worker.make(ParallelConfig()))
    reports = two_processes[name]
    assert sum(report["loss"] for report in reports) == pytest.approx(loss, rel=1e-6)
    found = {k: v for report in reports for k, v in report["gradients"].items()}
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, parameter
        torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=1e-5 * scale)


def test_outputs_are_freed(two_processes):
    """Of those a stage has computed before, when it computes the next one."""
    first, last = two_processes["stages"]
    assert (first["held"], last["held"]) == (0, 0)
    for report in two_processes["parts of stages"]:
        assert report["held"] <= 2


def test_no_output_is_freed_before_it_is_sent(two_processes):
    for report in two_processes["parts of stages"]:
        assert len(report["whole"]) > pipeline_worker.MICRO_BATCHES
        assert all(report["whole"])
