"""docs/scaling-library.md: every block runs, one after another; what cannot work is a sentence."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import evals.scaling
from benchmarks.scaling_laws import grid_of_runs
from evals.scaling import Points, fit, plan, predict
from evals.scaling.planning import SizeChoice, planned_curve
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig
from tests.helpers.processes import ROOT

PAGE = (ROOT / "docs/scaling-library.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_every_block_of_the_page_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(BLOCKS) >= 7
    assert PAGE.count("```") == 2 * len(BLOCKS)
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"block {number}", "exec"), names)
    told = capsys.readouterr().out
    assert "the data say less about it than its prior" in told
    assert 2.2 < names["final"] < 2.9
    assert 0.7 < names["score"][0] < 0.95


def test_names_of_the_page_are_public():
    for line in "".join(BLOCKS).splitlines():
        if line.startswith("from evals.scaling import"):
            for name in line.split("import ")[1].split(", "):
                assert name in evals.scaling.__all__
    for name in evals.scaling.__all__:
        assert getattr(evals.scaling, name) is not None


@pytest.fixture(scope="module")
def fitted():
    points = grid_of_runs(0.003).only(range(0, 240, 6))
    return fit("chinchilla", points, samples=8)


def test_a_budget_and_a_point(fitted):
    choice = plan(fitted, flops=1e21)
    assert isinstance(choice, SizeChoice)
    assert choice.parameters * choice.tokens * 6 == pytest.approx(1e21)
    (row,) = predict(fitted, parameters=1e9, tokens=2e10).to_dict("records")
    assert row["low"] < row["predicted"] < row["high"]
    assert row["extrapolates"] == ""
    (far,) = predict(fitted, parameters=1e12, tokens=2e10).to_dict("records")
    assert "x the largest fitted N" in far["extrapolates"]
    assert far["high"] - far["low"] > row["high"] - row["low"]


def test_what_cannot_work_is_one_sentence(fitted):
    curve = planned_curve(ScheduleConfig("cosine", 10), 1e-3, 100, points=50)
    points = grid_of_runs()
    wrong: list[tuple[Any, str]] = [
        (lambda: fit("chinchila", points), "law is 'chinchila' .did you mean 'chinchilla'"),
        (lambda: fit("chinchilla", [curve]), "fitted to one Points, found Curve"),
        (lambda: fit("intrinsic", points), "fitted to one or more Curves, found Points"),
        (lambda: fit("intrinsic", []), "found nothing"),
        (lambda: predict(fitted, parameters=1e9), "predicts Points, or parameters and tokens"),
        (lambda: predict(fitted, curve), "predicts Points, or parameters and tokens"),
        (lambda: plan(fitted, steps=100), "needs flops"),
        (lambda: plan(fitted, flops=-1.0), "flops is -1.0, expected a number above 0"),
        (lambda: fit("data_constrained", points), "needs every run's unique_tokens"),
        (lambda: fit("experts", points), "needs every run's total_parameters"),
        (
            lambda: Points(np.ones(2), np.ones(2), np.array([1.0, -1.0])),
            "loss holds -1.0, expected positive numbers",
        ),
    ]
    for call, message in wrong:
        with pytest.raises(UserError, match=message):
            call()
