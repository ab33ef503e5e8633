"""The common curve of all arms, whose slope turns differences of a metric into compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

_EXPONENT = (0.2, 0.5)  # median, and standard deviation of the logarithm
_GRID = np.exp(np.log(_EXPONENT[0]) + _EXPONENT[1] * np.linspace(-3, 3, 61))
_NOISE = 0.01  # of the range of the values, at least


@dataclass
class CommonCurve:
    """m(N, D) = E + A N^-p + B D^-p for every p of a grid, with the weights of these p."""

    coefficients: Array  # (grid, 3): E, A, B
    weights: Array
    scales: tuple[float, float]
    floor: float  # of the slope: where nothing falls, differences say nothing

    def value(self, parameters: float, tokens: float) -> float:
        """Return the metric of the arms' common curve."""
        n, d = parameters / self.scales[0], tokens / self.scales[1]
        terms = np.stack([np.ones_like(_GRID), n**-_GRID, d**-_GRID], axis=1)
        return float(self.weights @ (terms * self.coefficients).sum(1))

    def slope(self, parameters: float, tokens: float, *, lengths_only: bool = False) -> float:
        """Return how much the metric falls for an e-fold of compute, split evenly or all length."""
        n, d = parameters / self.scales[0], tokens / self.scales[1]
        by_n = _GRID * self.coefficients[:, 1] * n**-_GRID
        by_d = _GRID * self.coefficients[:, 2] * d**-_GRID
        each = by_d if lengths_only else (by_n + by_d) / 2
        return max(float(self.weights @ each), self.floor)

    @property
    def flat(self) -> bool:
        """Return whether the metric does not fall at all."""
        return bool(self.weights @ self.coefficients[:, 1:].sum(1) <= 0)


def fit_common_curve(cells: Sequence[tuple[float, float]], medians: Sequence[float]) -> CommonCurve:
    """Fit the curve to the medians over arms of every size and length, with a prior on p.

    Coefficients are not negative. Size and length share the exponent, over whose posterior the
    slopes are averaged: few cells do not tell it. The fit does not depend on the metric's unit.
    """
    from scipy.optimize import nnls

    sizes, y = np.array(cells, float), np.array(medians, float)
    scales = np.exp(np.log(sizes).mean(0))
    n, d = (sizes / scales).T
    unit = max(float(np.ptp(y)), 1e-12 * float(np.abs(y).max()), 1e-300)
    base = float(y.min())
    one_size = len({cell[0] for cell in cells}) == 1
    coefficients, residuals = np.zeros((len(_GRID), 3)), np.zeros(len(_GRID))
    for i, p in enumerate(_GRID):
        # E may be anything from 0; A is not told from it by runs of one size.
        first = np.zeros_like(n) if one_size else n**-p
        terms = np.stack([np.ones_like(n), first, d**-p], axis=1)
        coefficients[i], norm = nnls(terms, y / unit)
        residuals[i] = norm**2
    freedom = max(len(y) - 3, 1)
    noise = max(_NOISE**2, float(residuals.min()) / freedom)
    log = -residuals / (2 * noise) - 0.5 * (np.log(_GRID / _EXPONENT[0]) / _EXPONENT[1]) ** 2
    weights = np.exp(log - log.max())
    floor = 1e-3 * unit if np.ptp(y) > 0 else max(abs(base), 1.0)
    return CommonCurve(
        coefficients * unit, weights / weights.sum(), (float(scales[0]), float(scales[1])), floor
    )
