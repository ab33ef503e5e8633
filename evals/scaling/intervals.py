"""Intervals by block bootstrap, and the choice among laws by held-out curves."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.stats import t as student_t

from evals.scaling.curves import Curve, Points
from evals.scaling.fitting import Fit, Options, Problem, correlation_length, fit
from evals.scaling.parameters import Array, Law
from evals.scaling.progress import counted
from pretrain.common.errors import UserError

LEVEL = 0.95


def bootstrap(
    found: Fit, data: Sequence[Any], samples: int = 200, seed: int = 0, processes: int | None = None
) -> Fit:
    """Refit to fitted loss x resampled residuals; fill ``found.intervals`` and ``found.samples``.

    Residuals are drawn from all curves in blocks of neighbors, twice their correlation length long;
    those of points one by one. They are scaled up for the parameters that were fitted to them, and
    for the correlation that is lost at the blocks' ends. Priors are redrawn for each sample, so
    that a parameter known only by its prior has the prior's interval. The result does not depend
    on the number of processes. Returns ``found``.
    """
    law = found.law
    prepared = [law.prepared(item) for item in data]
    residuals = [np.log(item.loss / law.loss(found.theta, found.beta, item)) for item in prepared]
    curves = hasattr(prepared[0], "step")
    correlation = correlation_length(residuals) if curves else 1.0
    length = max(1, math.ceil(2 * correlation)) if curves else 1
    # Fitted residuals are smaller than true ones by the parameters they were fitted with.
    count = sum(len(r) for r in residuals) / correlation
    spread = math.sqrt(
        count / max(count - len(law.parameters), 1) / kept_by_blocks(correlation, length)
    )
    tasks = [
        (found, prepared, [r * spread for r in residuals], length, (seed, i))
        for i in range(samples)
    ]
    workers = min(processes or os.cpu_count() or 1, samples)
    if workers > 1 and samples >= 8:
        with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
            done = pool.map(_refit, tasks, chunksize=max(1, samples // (16 * workers)))
            rows = list(counted(done, samples, "bootstrap samples"))
    else:
        rows = list(counted(map(_refit, tasks), samples, "bootstrap samples"))
    found.samples = np.stack(rows)
    low, high = ends_around(np.concatenate([found.theta, found.beta]), found.samples)
    for i, parameter in enumerate(law.parameters):
        ends = [float(low[i]), float(high[i])]
        if i < len(found.theta):
            least, most = law.bounds()[i]
            ends = [parameter.from_search(min(max(x, least), most)) for x in ends]
        found.intervals[parameter.name] = (ends[0], ends[1])
    return found


def kept_by_blocks(correlation: float, length: int) -> float:
    """Return the share of a mean's variance that blocks of ``length`` neighbors preserve.

    The residuals' autocorrelation is assumed to fall geometrically with the lag and to add up to
    ``correlation``.
    """
    one = (correlation - 1) / (correlation + 1)
    lags = np.arange(1, length)
    return (1 + 2 * float(((1 - lags / length) * one**lags).sum())) / correlation


def _refit(task: tuple[Fit, list[Any], list[Array], int, tuple[int, int]]) -> Array:
    found, prepared, residuals, length, seed = task
    law, generator = found.law, np.random.default_rng(seed)
    new = []
    for item in prepared:
        drawn = _blocks(residuals, len(item.loss), length, generator)
        copy = object.__new__(type(item))
        copy.__dict__.update(item.__dict__)
        copy.loss = law.loss(found.theta, found.beta, item) * np.exp(drawn)
        new.append(copy)
    problem = Problem(law, new, found.options)
    spread = np.where(problem.precision > 0, np.maximum(problem.precision, 1e-300) ** -0.5, 0.0)
    problem.center = problem.center + spread * generator.standard_normal(len(spread))
    theta = found.theta
    if len(theta):
        result = minimize(
            problem,
            theta,
            jac=True,
            method="L-BFGS-B",
            bounds=law.bounds(),
            options={"maxiter": 60, "ftol": 1e-9, "gtol": 1e-6},
        )
        theta = np.asarray(result.x)
    beta = problem.solve(problem.designs(theta)[0])
    row: Array = np.concatenate([theta, beta])
    return row


def _blocks(
    residuals: list[Array], count: int, length: int, generator: np.random.Generator
) -> Array:
    sizes = np.array([len(r) for r in residuals])
    pieces, have = [], 0
    while have < count:
        source = residuals[generator.choice(len(residuals), p=sizes / sizes.sum())]
        start = int(generator.integers(len(source)))
        piece = source[(start + np.arange(min(length, len(source)))) % len(source)]
        pieces.append(piece)
        have += len(piece)
    drawn: Array = np.concatenate(pieces)[:count]
    return drawn


def interval(found: Fit, data: Any, *, new_run: bool = False, seed: int = 0) -> tuple[Array, Array]:
    """Return the low and high ends (n,) of the predicted loss's 95 % interval.

    They are those of the law, or with ``new_run`` of a run's log, with residuals like those of the
    fitted runs. Raises UserError for a fit without bootstrap samples.
    """
    predictions = np.log(found.predict_samples(data))
    if new_run:
        if not found.residuals:
            raise UserError("the fit was read from a file, which does not store residuals")
        generator = np.random.default_rng(seed)
        length = max(1, math.ceil(2 * correlation_length(found.residuals)))
        predictions = predictions + np.stack(
            [_blocks(found.residuals, predictions.shape[1], length, generator) for _ in predictions]
        )
    low, high = ends_around(np.log(found.predict(data)), predictions)
    return np.exp(low), np.exp(high)


def ends_around(estimate: Array, samples: Array) -> tuple[Array, Array]:
    """Return the 95 % interval of an estimate (n,) with the spread of bootstrap samples (m, n).

    The parameters of a curve depend on each other so much that their samples are skewed; quantiles
    of the samples would then cover 87 to 92 % of simulated truths, while these cover 95 %.
    """
    if len(samples) < 2:
        return np.full_like(estimate, -np.inf), np.full_like(estimate, np.inf)
    width = student_t.ppf((1 + LEVEL) / 2, len(samples) - 1) * samples.std(0, ddof=1)
    return estimate - width, estimate + width


def ends_of(samples: Array) -> tuple[Array, Array]:
    """Return the 95 % interval over the first axis; few samples make it wider, not narrower."""
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0, method="weibull")
    return low, high


@dataclass
class HeldOut:
    """A law's ``errors`` on held-out curves: the MAPE in percent by the curve's name."""

    law: str
    errors: dict[str, float]

    @property
    def mean(self) -> float:
        """The mean of the errors in percent."""
        return float(np.mean(list(self.errors.values())))


def hold_out_schedules(
    make: Callable[[Sequence[Curve]], Law], curves: Sequence[Curve], options: Options | None = None
) -> HeldOut:
    """Predict each curve from the others, holding out curves of one schedule together.

    Raises UserError for fewer than 3 schedules.
    """
    groups: dict[str, list[int]] = {}
    for i, curve in enumerate(curves):
        groups.setdefault(_schedule_key(curve), []).append(i)
    if len(groups) < 3:
        raise UserError(
            f"there are {len(groups)} different schedules: expected at least 3 to choose a law by "
            "held-out schedules"
        )
    return _hold_out(make, curves, list(groups.values()), options)


def hold_out_sizes(
    make: Callable[[Sequence[Curve]], Law], curves: Sequence[Curve], options: Options | None = None
) -> HeldOut:
    """Predict each size from the others; raises UserError for fewer than 4 sizes."""
    groups: dict[float, list[int]] = {}
    for i, curve in enumerate(curves):
        groups.setdefault(curve.parameters or 0.0, []).append(i)
    if len(groups) < 4:
        raise UserError(
            f"there are {len(groups)} sizes: expected at least 4 to choose a law by held-out sizes"
        )
    return _hold_out(make, curves, list(groups.values()), options)


def _hold_out(
    make: Callable[[Sequence[Curve]], Law],
    curves: Sequence[Curve],
    groups: list[list[int]],
    options: Options | None,
) -> HeldOut:
    errors, name = dict[str, float](), ""
    for group in groups:
        rest = [c for i, c in enumerate(curves) if i not in group]
        law = make(rest)
        name, found = law.name, fit(law, rest, options)
        for i in group:
            errors[curves[i].name] = mape(found, curves[i])
    return HeldOut(name, errors)


def mape(found: Fit, data: Curve | Points) -> float:
    """Return the mean absolute percentage error of the predicted loss."""
    return 100 * float(np.abs(found.predict(data) / data.loss - 1).mean())


def _schedule_key(curve: Curve) -> str:
    return hashlib.sha256(np.round(curve.lr / curve.peak, 6).tobytes()).hexdigest()
