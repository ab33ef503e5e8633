"""Name the runs that no fitted law explains, and fit without them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from evals.scaling.curves import Points
from evals.scaling.determined import covariance, jacobian
from evals.scaling.fitting import Fit, Options, Problem, fit, search
from evals.scaling.parameters import Array, Law
from evals.scaling.repeated_data import DataConstrainedLaw

KEPT = 0.75  # share of the runs by which the law and the spread around it are judged
CHANCE = 0.05  # that any run at all is named where there is no outlier
ROUNDS = 20
# Of a Weibull distribution of the residuals' sizes: 1 has the tail of a Laplace distribution, 1.3
# is nearest to the normal one. Few runs tell little about it: these many count for what is USUAL.
SHAPES, USUAL, FEW = (0.7, 1.3), 1.1, 50
RISE = 0.01  # relative, more than two seeds differ by
LEAST = 8  # runs more than parameters, of those that agree best: with fewer none is named


@dataclass
class Outlier:
    """A run that is left out: its relative ``error``, logged / expected - 1, and the ``limit``."""

    name: str
    error: float
    limit: float
    why: str


def robust_fit(
    law: Law, points: Points, options: Options | None = None
) -> tuple[Fit, list[Outlier], Points]:
    """Fit to all runs but outliers; returns the fit, the outliers and the runs that are left.

    The law is first fitted to the three quarters of the runs that agree best with it, so that
    outliers cannot draw it to themselves. Runs that lie further from it than the spread and the
    tail of these explain are left out: with independent residuals, one table in 20 loses a run for
    no reason.
    """
    options = options or Options("log")
    every = np.arange(len(points.loss))
    found = fit(law, [points], options)
    fewest = len(law.parameters) + LEAST
    if len(every) * KEPT < fewest:
        return found, [], points
    kept, most = every, max(int(KEPT * len(every)), fewest)
    current = found
    for _ in range(ROUNDS):
        nearest = np.sort(np.argsort(np.abs(_errors(current, points)), kind="stable")[:most])
        if np.array_equal(nearest, kept):
            break
        kept = nearest
        current = _continued(current, points.only(kept))
    named = np.zeros(len(every), dtype=bool)
    for _ in range(ROUNDS):
        limits = _limits(current, points, kept)
        again = np.abs(_errors(current, points)) > limits
        if len(every) - again.sum() < fewest or (np.array_equal(again, named) and again.any()):
            break
        named, kept = again, every[~again]
        if not named.any():
            return found, [], points
        current = _continued(current, points.only(kept))
    left = points.only(every[~named])
    refit = fit(law, [left], options)
    errors, limits = _errors(refit, points), _limits(refit, points, every[~named])
    return (
        refit,
        [
            _outlier(points.names[i], math.expm1(float(errors[i])), math.expm1(float(limits[i])))
            for i in every[named]
        ],
        left,
    )


def fit_without_outliers(
    law: Law, points: Points, options: Options | None = None, *, keep: bool = False
) -> tuple[Fit, list[Outlier], Points]:
    """Fit to the runs that are no outliers; returns the fit, the outliers and the other runs.

    A law of repeated data cannot explain that a loss rises again: such runs are left out first.
    With ``keep`` all runs are fitted.
    """
    if keep:
        return fit(law, [points], options or Options("log")), [], points
    risen = rising(points) if isinstance(law, DataConstrainedLaw) else []
    names = {o.name for o in risen}
    rest = points.only([i for i, n in enumerate(points.names) if n not in names])
    found, outliers, left = robust_fit(law, rest if risen else points, options)
    return found, [*risen, *outliers], left


def _outlier(name: str, error: float, limit: float) -> Outlier:
    why = f"{100 * error:+.1f} % from the law, expected within {100 * limit:.1f} %"
    return Outlier(name, error, limit, why)


def rising(points: Points) -> list[Outlier]:
    """Name the runs whose loss is above that of a run that is nowhere larger.

    Such a run has no more parameters, tokens or unique tokens, yet a loss lower by RISE or more:
    further epochs or parameters did harm, which laws of repeated data do not model.
    """
    assert points.unique_tokens is not None
    found = []
    for i, name in enumerate(points.names):
        smaller = (
            (points.parameters <= points.parameters[i])
            & (points.tokens <= points.tokens[i])
            & (points.unique_tokens <= points.unique_tokens[i])
        )
        best = int(np.argmin(np.where(smaller, points.loss, np.inf)))
        error = float(points.loss[i] / points.loss[best] - 1)
        if error > RISE:
            why = f"{100 * error:.1f} % above {points.names[best]}, a run with no more of anything"
            found.append(Outlier(name, error, RISE, why))
    return found


def _continued(found: Fit, points: Points) -> Fit:
    """Fit to other runs, from the parameters of a fit on."""
    problem = Problem(found.law, [found.law.prepared(points)], found.options)
    theta = np.asarray(search(problem, found.theta).x)
    columns, _ = problem.designs(theta)
    beta = problem.solve(columns)
    return replace(found, theta=theta, beta=beta, residuals=[problem.residuals(columns @ beta)])


def _errors(found: Fit, points: Points) -> Array:
    result: Array = np.log(points.loss / np.maximum(found.predict(points), 1e-12))
    return result


def _limits(found: Fit, points: Points, kept: NDArray[np.int64]) -> Array:
    """Return how far (n,) each run may lie from the law by chance.

    The sizes of the residuals have a Weibull distribution with the median and the 75 % quantile
    of those of all runs. The law itself is less certain where it is extrapolated.
    """
    sizes = np.abs(_errors(found, points))
    middle, upper = np.quantile(sizes, [0.5, KEPT])
    middle = max(float(middle), 1e-6)
    shape = math.log(2) / math.log(max(float(upper) / middle, 1.01))
    shape = min(max(shape, SHAPES[0]), SHAPES[1])
    shape = (len(sizes) * shape + FEW * USUAL) / (len(sizes) + FEW)
    free = len(kept) - len(found.law.parameters)
    scale = middle / math.log(2) ** (1 / shape) * math.sqrt(len(kept) / max(free, 1))
    chance = scale * math.log(len(points.loss) / CHANCE) ** (1 / shape)
    at = jacobian(found, [found.law.prepared(points)])
    spread = covariance(found, [found.law.prepared(points.only(kept))])
    unsure = np.sqrt(np.maximum(np.einsum("np,pq,nq->n", at, spread, at), 0.0))
    deviation = middle / 0.6745
    result: Array = chance * np.sqrt(1 + np.minimum(unsure / deviation, 3.0) ** 2)
    return result
