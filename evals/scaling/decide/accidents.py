"""Find what goes wrong with runs and metrics, and say so."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from evals.scaling.decide.curve import fit_common_curve
from evals.scaling.decide.runs import Cell, Run

_ABOVE = 1.0  # nats above the common curve, from which a run counts as diverged
_SIGNIFICANT = 0.01


def diverged(runs: Sequence[Run], *, nats: bool) -> list[Run]:
    """Return the runs without a finite value and, for a loss, those a nat above the others."""
    broken = [run for run in runs if not math.isfinite(run.value)]
    sound = [run for run in runs if math.isfinite(run.value)]
    cells = sorted({run.cell for run in sound})
    if not nats or len(cells) < 3:
        return broken
    medians = [float(np.median([r.value for r in sound if r.cell == cell])) for cell in cells]
    curve = fit_common_curve(cells, medians)
    return broken + [run for run in sound if run.value > curve.value(*run.cell) + _ABOVE]


def spread_grows(runs: Iterable[Run]) -> list[str]:
    """Return the arms whose seeds differ more at the largest size than at the smallest (F-test)."""
    from scipy.stats import f

    values: dict[str, dict[Cell, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        values[run.arm][run.cell].append(run.value)
    found = []
    for arm, by_cell in sorted(values.items()):
        repeated = [cell for cell in sorted(by_cell) if len(by_cell[cell]) > 1]
        if len(repeated) < 2:
            continue
        small, large = by_cell[repeated[0]], by_cell[repeated[-1]]
        ratio = np.var(large, ddof=1) / max(float(np.var(small, ddof=1)), 1e-300)
        if f.sf(ratio, len(large) - 1, len(small) - 1) < _SIGNIFICANT:
            found.append(arm)
    return found
