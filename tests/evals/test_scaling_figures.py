"""Pictures of laws: what is drawn is what titles say; notes are few."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.scaling_laws import grid_of_runs, true_fit
from evals.scaling import Points, figures
from evals.scaling.notes import grouped
from evals.scaling.planning import planned_curve
from pretrain.config import ScheduleConfig


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of the figures that are to be saved."""
    kept = []

    def save(figure, path):
        kept.append(figure)
        return path

    monkeypatch.setattr(figures, "save", save)
    return kept


def curves(found, count, steps=3000):
    made = []
    for i in range(count):
        kind = ("cosine", "constant")[i % 2]
        curve = planned_curve(ScheduleConfig(kind, 100), 1e-3, steps, points=50, name=f"{kind}-{i}")
        made.append(replace(curve, loss=found.predict(curve)))
    return made


def texts(figure):
    titles = [axes.get_title() for axes in figure.axes]
    legends = [*figure.legends, *(s for part in figure.subfigs for s in part.legends)]
    legends += [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    return titles, [[t.get_text() for t in legend.get_texts()] for legend in legends]


def bands(axes):
    return [
        c
        for c in axes.collections
        if type(c).__name__ in ("PolyCollection", "FillBetweenPolyCollection")
    ]


def with_samples(found):
    found.samples = np.stack([np.concatenate([found.theta, found.beta])] * 3)
    found.samples[:, -1] *= [0.9, 1.0, 1.1]
    return found


def test_fitted_and_held_out_are_told_apart(drawn, tmp_path):
    found, _ = true_fit("intrinsic")
    fitted, others = curves(found, 2), curves(found, 30)
    figures.draw_curves(found, fitted, tmp_path / "a.png", others)
    titles, legends = texts(drawn[0])
    assert titles[0].startswith("fitted: 2 curves, mean error")
    assert titles[2].startswith("held out: 30 curves, mean error")
    assert sorted(map(len, legends)) == [2, 30]
    assert drawn[0].get_figheight() > 7, "thirty names have room below"
    assert not any(bands(axes) for axes in drawn[0].axes)
    figures.draw_curves(with_samples(found), fitted, tmp_path / "b.png", others[:3])
    titles, _ = texts(drawn[1])
    assert titles[2].startswith("held out with 95 % intervals: 3 curves")
    assert [len(bands(axes)) for axes in drawn[1].axes] == [0, 0, 3, 0]


def test_predictions_name_intervals_only_if_there_are_any(drawn, tmp_path):
    found, _ = true_fit("intrinsic")
    found.domain = {"steps": [100, 1000], "peak_lr": [1e-3, 1e-3]}
    figures.draw_prediction(found, curves(found, 12), [False] * 12, tmp_path / "a.png")
    figures.draw_prediction(with_samples(found), curves(found, 1), [True], tmp_path / "b.png")
    assert texts(drawn[0])[0][0] == "Intrinsic-time law, without intervals"
    assert texts(drawn[1])[0][0] == "Intrinsic-time law, 95 % intervals"
    assert [len(bands(figure.axes[0])) for figure in drawn] == [0, 1]
    for figure in drawn:
        assert any("beyond the fitted steps, up to 3.0 x" in t for t in texts(figure)[1][0])


def test_budgets_have_parabolas(drawn, tmp_path):
    found, points = true_fit("chinchilla")[0], grid_of_runs(0.002)
    figures.draw_points(found, points, tmp_path / "a.png")
    axes = drawn[0].axes[-1]
    assert axes.get_title().startswith("isoFLOP profiles")
    stars = [line for line in axes.lines if line.get_marker() == "*" and len(line.get_xdata())]
    curved = [line for line in axes.lines if len(line.get_xdata()) == 100]
    assert len(curved) >= len(stars) >= 2
    for star in stars:
        lowest = min(curved, key=lambda c: abs(np.min(c.get_ydata()) - star.get_ydata()[0]))
        assert np.min(lowest.get_ydata()) == pytest.approx(star.get_ydata()[0], abs=1e-3)
    n = np.geomspace(1e6, 1e8, 8)
    line = Points(n, 20 * n, np.asarray(found.predict(Points(n, 20 * n, np.ones(8)))))
    figures.draw_points(found, line, tmp_path / "b.png")
    assert len(drawn[1].axes) == 2, "a row of sizes has no budgets"


def test_notes_that_are_alike_are_one():
    every = [f"run-{i}: it begins at step {i},000" for i in range(1, 9)]
    assert grouped(every) == [
        "run-1: it begins at step 1,000; run-2, run-3, run-4, run-5 and 3 others likewise"
    ]
    same = [f"{name}: its axis counts tokens" for name in "abcdef"]
    assert grouped([*same, "a: another"]) == [
        "a, b, c, d and 2 others: its axis counts tokens",
        "a: another",
    ]
