"""The optimal learning rate and batch size by model size and tokens."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from evals.scaling.intervals import LEVEL
from evals.scaling.parameters import Array
from pretrain.common.errors import UserError

SOURCE = "arXiv 2503.04715"
NEAR = 0.02  # relative: runs with a loss this much above the lowest shape the parabola
SWEEP = 6  # runs with the same N and D, from which on a parabola is fitted to them


@dataclass
class Optima:
    """The best learning rate and batch size of each N and D; all (n,).

    lr, batch: NaN where the runs do not enclose the optimum; ``batch`` in tokens. how: what each
    was taken from.
    """

    parameters: Array
    tokens: Array
    lr: Array
    batch: Array
    how: list[str]


@dataclass
class PowerFit:
    """log y = constant + sum of exponents times the logs of N and D, by least squares."""

    name: str
    variables: tuple[str, ...]
    coefficients: Array
    covariance: Array
    spread: float
    free: int

    def at(self, parameters: float, tokens: float) -> tuple[float, float, float]:
        """Return y and its 95 % interval, of an optimum that one sweep would find."""
        known = {"N": np.log(parameters), "D": np.log(tokens)}
        row = np.array([1.0, *(known[v] for v in self.variables)])
        middle = float(row @ self.coefficients)
        deviation = float(np.sqrt(row @ self.covariance @ row + self.spread**2))
        width = float(student_t.ppf((1 + LEVEL) / 2, self.free)) * deviation
        low, high = np.exp(middle - width), np.exp(middle + width)
        return float(np.exp(middle)), float(low), float(high)

    def to_json(self) -> dict[str, Any]:
        """Return the fit as it is written to a file."""
        errors = np.sqrt(np.diag(self.covariance))
        width = float(student_t.ppf((1 + LEVEL) / 2, self.free)) * errors
        named = zip(("constant", *self.variables), self.coefficients, width, strict=True)
        return {
            "of": self.name,
            "exponents": {
                n: {"value": float(c), "interval_95": [float(c - w), float(c + w)]}
                for n, c, w in named
            },
            "spread": self.spread,
            "source": SOURCE,
        }


def optima_of(parameters: Array, tokens: Array, lr: Array, batch: Array, loss: Array) -> Optima:
    """Find the optimum of each group of runs with the same N and D.

    A parabola in log lr and log batch is fitted to the runs near a group's lowest loss; its minimum
    counts where it lies among the runs. A group of one run is an optimum that was found elsewhere.
    """
    rows, how = [], []
    keys = sorted(set(zip(parameters.tolist(), tokens.tolist(), strict=True)))
    for n, d in keys:
        at = np.flatnonzero((parameters == n) & (tokens == d))
        found = (float(lr[at[0]]), float(batch[at[0]]), "given")
        if len(at) > 1:
            found = _optimum(lr[at], batch[at], loss[at])
        rows.append((n, d, found[0], found[1]))
        how.append(found[2])
    columns = np.array(rows).T
    return Optima(columns[0], columns[1], columns[2], columns[3], how)


def _optimum(lr: Array, batch: Array, loss: Array) -> tuple[float, float, str]:
    best = int(np.argmin(loss))
    logs = [np.log(lr), np.log(batch)]
    axes = [i for i, x in enumerate(logs) if len(np.unique(x)) >= 3]
    chosen = np.flatnonzero(loss <= loss[best] * (1 + NEAR))
    terms = 1 + 2 * len(axes) + (len(axes) == 2)
    if len(chosen) < max(terms + 1, SWEEP):
        chosen = np.argsort(loss)[: max(terms + 1, SWEEP)]
    result = [np.nan, np.nan]
    for i, values in enumerate((lr, batch)):
        edge = values[best] in (values.min(), values.max())
        result[i] = np.nan if edge and len(np.unique(values)) > 1 else float(values[best])
    if not axes or len(chosen) < terms + 1:
        return result[0], result[1], "best run"
    centers = [logs[i][best] for i in axes]
    moved = [logs[i][chosen] - c for i, c in zip(axes, centers, strict=True)]
    columns = [np.ones(len(chosen)), *moved, *(m**2 for m in moved)]
    if len(axes) == 2:
        columns.append(moved[0] * moved[1])
    fitted = np.linalg.lstsq(np.stack(columns, axis=1), loss[chosen], rcond=None)[0]
    k = len(axes)
    hessian = np.diag(2 * fitted[1 + k : 1 + 2 * k])
    if k == 2:
        hessian[0, 1] = hessian[1, 0] = fitted[-1]
    if np.linalg.eigvalsh(hessian).min() <= 0:
        return result[0], result[1], "best run"
    minimum = np.linalg.solve(hessian, -fitted[1 : 1 + k])
    for j, i in enumerate(axes):
        value = float(minimum[j] + centers[j])
        inside = logs[i].min() <= value <= logs[i].max()
        result[i] = float(np.exp(value)) if inside else np.nan
    return result[0], result[1], f"parabola of {len(chosen)} runs"


def fit_powers(
    optima: Optima, variables: dict[str, tuple[str, ...]] | None = None
) -> list[PowerFit]:
    """Fit lr = c N^a D^b and batch = c D^b, the form of the step law (Li et al., arXiv 2503.04715).

    ``variables`` names for each which of N and D enter. Raises UserError where there are too few
    optima, or N or D do not vary.
    """
    fits = []
    for name, used in (variables or {"lr": ("N", "D"), "batch": ("D",)}).items():
        values = np.asarray(getattr(optima, name))
        known = np.isfinite(values)
        if known.sum() < len(used) + 2:
            raise UserError(
                f"the optimal {name} is enclosed by the runs of {known.sum()} pairs of N and D, "
                f"expected at least {len(used) + 2}"
            )
        logs = {"N": np.log(optima.parameters[known]), "D": np.log(optima.tokens[known])}
        matrix = np.stack([np.ones(known.sum()), *(logs[v] for v in used)], axis=1)
        for v in used:
            if np.ptp(logs[v]) == 0:
                raise UserError(f"all runs have the same {v}, which determines no exponent of it")
        for first, second in itertools.combinations(used, 2):
            if abs(np.corrcoef(logs[first], logs[second])[0, 1]) > 0.999:
                raise UserError(
                    f"{first} and {second} of the runs rise together, so that their exponents "
                    f"cannot be told apart; expected runs with other ratios of {second} to {first}"
                )
        target = np.log(values[known])
        coefficients = np.linalg.lstsq(matrix, target, rcond=None)[0]
        residual = target - matrix @ coefficients
        free = len(target) - matrix.shape[1]
        spread = float(np.sqrt(residual @ residual / free))
        covariance = spread**2 * np.linalg.inv(matrix.T @ matrix)
        fits.append(PowerFit(name, used, coefficients, covariance, spread, free))
    return fits
