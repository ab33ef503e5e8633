"""The curves of a report as numbers, for the page's script to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.report.figures import color_of
from evals.report.groups import Group
from evals.report.runs import Run
from evals.scaling.parameters import Array

MOST_POINTS = 500  # of a curve: beyond, neighbours are averaged, few early and more later on
_EARLY = 150  # of these points are as close as a logarithmic axis needs at its start
_DASHES = {"-": [], "--": [6, 3], ":": [2, 3], "-.": [8, 3, 2, 3]}
_QUANTITIES = {
    "training loss": "nats per token",
    "validation loss": "nats per token",
    "bits per byte": "validation",
}


def make_curves(groups: Sequence[Group]) -> dict[str, Any]:
    """Return what the script draws: for each arm its curves, one list of values for each seed."""
    arms = []
    for index, group in enumerate(groups):
        color, line = color_of(index)
        curves = {name: _curve(group.runs, name) for name in _QUANTITIES}
        arms.append(
            {
                "label": group.label,
                "color": color,
                "dash": _DASHES[line],
                "runs": [run.name for run in group.runs],
                "curves": {name: curve for name, curve in curves.items() if curve is not None},
                "borders": [_border(run, border) for run in group.runs for border in run.borders],
            }
        )
    found = {name for arm in arms for name in arm["curves"]}
    quantities = [(name, unit) for name, unit in _QUANTITIES.items() if name in found]
    return {"quantities": quantities, "arms": arms}


def _values(run: Run, name: str) -> tuple[Array, Array]:
    """Return tokens and values of one of the quantities of a run."""
    if name == "training loss":
        return run.tokens, run.loss
    column = 1 if name == "validation loss" else 2
    known = [(row[0], row[column]) for row in run.valid if row[column] is not None]
    found = np.array(known, dtype=float).reshape(-1, 2)
    order = np.argsort(found[:, 0], kind="stable")
    return found[order, 0], found[order, 1]


def _curve(runs: Sequence[Run], name: str) -> dict[str, Any] | None:
    """Return steps, tokens, FLOPs, seconds and each seed's values, None where no run has values.

    Seeds are put at the tokens of the one that went the furthest; what a seed lacks is null.
    """
    known = [(run, *_values(run, name)) for run in runs]
    known = [(run, tokens, values) for run, tokens, values in known if len(tokens)]
    if not known:
        return None
    longest, at, _ = max(known, key=lambda found: (found[1][-1], len(found[1])))
    starts = _starts(len(at))
    seconds = [_at(at, run.tokens, run.seconds) for run, _, _ in known]
    per_token = longest.flops_per_token
    return {
        "step": _plain(_mean(_at(at, longest.tokens, longest.steps), starts), 7),
        "tokens": _plain(_mean(at, starts), 7),
        "flops": None if per_token is None else _plain(_mean(at * per_token, starts), 6),
        "seconds": _plain(_mean_of_seeds([_mean(s, starts) for s in seconds]), 6),
        "values": [_plain(_mean(_at(at, x, y), starts), 6) for _, x, y in known],
        "runs": [run.name for run, _, _ in known],
    }


def _border(run: Run, border: tuple[float, float, str]) -> dict[str, Any]:
    """Return where a phase begins, by everything that the curves are drawn over."""
    step, tokens, name = border
    seconds = float(np.interp(tokens, run.tokens, run.seconds))
    flops = None if run.flops_per_token is None else tokens * run.flops_per_token
    return {"name": name, "step": step, "tokens": tokens, "flops": flops, "seconds": seconds}


def _at(where: Array, x: Array, y: Array) -> Array:
    """Return ``y`` at other places, NaN beyond its ends."""
    return np.interp(where, x, y, left=np.nan, right=np.nan)


def _starts(count: int) -> np.ndarray:
    """Return where each of the bins begins into which ``count`` values go."""
    if count <= MOST_POINTS:
        return np.arange(count)
    early = np.geomspace(1, count, _EARLY) - 1
    late = np.linspace(0, count, MOST_POINTS - _EARLY, endpoint=False)
    return np.unique(np.concatenate([early, late]).astype(int))


def _mean(values: Array, starts: np.ndarray) -> Array:
    """Return the mean of the values of each bin, NaN where it has none."""
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    counts = np.add.reduceat(known.astype(float), starts)
    return np.divide(sums, counts, out=np.full(len(starts), np.nan), where=counts > 0)


def _mean_of_seeds(values: Sequence[Array]) -> Array:
    """Return the mean over those that have a value, NaN where none has."""
    known = np.isfinite(values)
    sums = np.where(known, values, 0.0).sum(0)
    counts = known.sum(0)
    return np.divide(sums, counts, out=np.full(len(sums), np.nan), where=counts > 0)


def _plain(values: Array, digits: int) -> list[float | int | None]:
    """Return numbers as short as ``digits`` allow, null for NaN."""
    found: list[float | int | None] = []
    for value in values.tolist():
        if value is None or not np.isfinite(value):
            found.append(None)
            continue
        short = float(f"{value:.{digits}g}")
        found.append(int(short) if short.is_integer() else short)
    return found
