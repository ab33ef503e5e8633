"""Four processes, under every layout, give one process's scores and train on as without."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import numpy as np
import pytest

from pretrain.config import ParallelConfig
from tests.helpers import scoring_worker
from tests.helpers.processes import run_on
from tests.helpers.scoring_worker import CASES, PAIRS

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]
BY_STATES = ("tied-tp2-dp2-zero0", "tied-dp4")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("scores") / "found.json"
    run_on(4, scoring_worker.__name__, path)
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@cache
def one_process(model):
    return scoring_worker.run(model, ParallelConfig())


@pytest.mark.parametrize("name", CASES)
def test_every_layout_scores_alike(name, four_processes):
    found, expected = four_processes[name], one_process(CASES[name][0])
    assert found["by"] == ("StateScorer" if name in BY_STATES else "ScheduleScorer")
    for some, others in zip(found["scores"], expected["scores"], strict=True):
        assert len(some) == len(PAIRS)
        assert np.allclose([s for s, _ in some], [s for s, _ in others], rtol=1e-5)
        assert [greedy for _, greedy in some] == [greedy for _, greedy in others]
    assert found["texts"] == expected["texts"]


@pytest.mark.parametrize("name", CASES)
def test_training_goes_on_as_if_nothing_had_been_scored(name, four_processes):
    assert four_processes[name]["steps"] == four_processes[f"{name}, without"]["steps"]
