"""Take from a set of runs what it says of each arm: differences in compute by size and length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from evals.scaling.decide.curve import Array, CommonCurve, fit_common_curve
from evals.scaling.decide.runs import Cell, Run, Target


@dataclass
class Observations:
    """Means over seeds of u, by arm and cell, padded to rectangles; ``count`` 0 is not run.

    Arms and cells have an order that follows from the data alone, so that nothing depends on names.
    """

    arms: list[str]
    targets: dict[str, Target]
    cells: list[Cell]
    u: Array  # (arms, cells)
    count: Array  # seeds
    squares: Array  # sum of squared deviations from the mean over seeds
    curve: CommonCurve

    @property
    def runs(self) -> int:
        """Return the number of runs that say something."""
        return int(self.count.sum())

    def position(self, arm: str, cell: Cell) -> tuple[float, float]:
        """Return where a cell lies from the arm's target, in e-folds of size and length."""
        return log_offset(cell, self.targets[arm])

    def positions(self) -> Array:
        """Return the positions of all arms and cells (arms, cells, 2)."""
        return np.array([[self.position(arm, cell) for cell in self.cells] for arm in self.arms])

    def slope(self, cell: Cell) -> float:
        """Return the common curve's slope, by length alone where all runs have one size."""
        return self.curve.slope(*cell, lengths_only=len({n for n, _ in self.cells}) == 1)


def log_offset(cell: Cell, target: Target) -> tuple[float, float]:
    """Return where a cell lies from a target, in e-folds of size and length."""
    return float(np.log(cell[0] / target.parameters)), float(np.log(cell[1] / target.tokens))


def observe(runs: Iterable[Run], targets: Mapping[str, Target]) -> Observations:
    """Turn runs into differences from the other arms, in units of compute.

    A cell that one arm alone has run says nothing of differences, and is used for the curve only.
    """
    values: dict[Cell, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in sorted(runs, key=lambda r: (r.cell, r.seed, r.value, r.arm)):
        values[run.cell][run.arm].append(run.value)
    order = sorted(values)
    medians = [float(np.median([np.mean(v) for v in values[c].values()])) for c in order]
    curve = fit_common_curve(order, medians)
    cells = [cell for cell in order if len(values[cell]) > 1]
    signature = {
        arm: [(cell, *values[cell][arm]) for cell in order if arm in values[cell]]
        for arm in targets
    }
    arms = sorted(targets, key=lambda arm: signature[arm])
    shape = (len(arms), len(cells))
    u, count, squares = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    found = Observations(arms, dict(targets), cells, u, count, squares, curve)
    one_size = len({n for n, _ in cells}) == 1
    for j, cell in enumerate(cells):
        slope = curve.slope(*cell, lengths_only=one_size)
        middle = float(np.mean([np.mean(v) for v in values[cell].values()]))
        for i, arm in enumerate(arms):
            if arm in values[cell]:
                each = -(np.array(values[cell][arm]) - middle) / slope
                u[i, j], count[i, j] = each.mean(), len(each)
                squares[i, j] = float(((each - each.mean()) ** 2).sum())
    return found
