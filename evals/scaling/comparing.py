"""Compare families of runs: where their fitted laws cross, and what it would cost to decide."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from evals.scaling.curves import Points
from evals.scaling.determined import jacobian
from evals.scaling.extrapolating import unknown_parameters
from evals.scaling.fitting import Fit, fit
from evals.scaling.intervals import bootstrap, ends_around, ends_of, interval
from evals.scaling.parameters import Array
from evals.scaling.size_laws import size_law

LOOSE = 0.1  # half of an interval of log loss, beyond which a law says nothing of its own runs
FURTHEST = 1e4  # times the largest budget: crossings are searched up to there


@dataclass
class Comparison:
    """A comparison of two families.

    better: the family with the lower predicted loss at the largest budget that both have, by
    ``difference`` nats with its 95 % interval; crossing: FLOPs at which the laws cross, with the
    interval over the bootstrap samples that cross, and the share that does; cost: total FLOPs of
    two additional runs, one of each family, that would make the difference at ``target`` FLOPs
    significant at 95 %, 0 where it already is, None where no runs up to the target suffice;
    largest: FLOPs of the largest run of the two; refused: why nothing determines the answer, or "".
    """

    families: tuple[str, str]
    better: str
    difference: float
    difference_interval: tuple[float, float]
    crossing: float | None
    crossing_interval: tuple[float, float] | None
    crossing_share: float
    target: float
    target_difference: float
    target_interval: tuple[float, float]
    cost: float | None
    largest: float
    refused: str = ""


def fit_families(families: dict[str, Points], samples: int = 200, seed: int = 0) -> dict[str, Fit]:
    """Fit a law of loss by compute to each family, with bootstrap samples.

    Raises UserError where a family has fewer than 3 budgets.
    """
    found = {}
    for number, (name, points) in enumerate(families.items()):
        points.name = name
        found[name] = bootstrap(
            fit(size_law("compute", points), [points]), [points], samples, seed + number
        )
    return found


def compare(
    fits: dict[str, Fit], families: dict[str, Points], target: float | None = None
) -> list[Comparison]:
    """Compare every pair of families, at ``target`` FLOPs or 100 times the largest run."""
    pairs = itertools.combinations(fits, 2)
    return [_pair((a, b), fits, families, target) for a, b in pairs]


def _pair(
    names: tuple[str, str], fits: dict[str, Fit], families: dict[str, Points], target: float | None
) -> Comparison:
    flops = [np.asarray(families[n].flops) for n in names]
    furthest = max(float(f.max()) for f in flops)
    largest = min(float(f.max()) for f in flops)
    lowest = max(float(f.min()) for f in flops)
    target = target or 100 * furthest
    grid = np.geomspace(lowest, max(target, FURTHEST * largest), 600)
    first, second = (fits[n] for n in names)
    at = budgets(grid)
    apart = first.predict(at) - second.predict(at)
    samples = first.predict_samples(at) - second.predict_samples(at)
    crossings = [x for x in (_crossing(grid, row) for row in samples) if x is not None]
    crossing = _crossing(grid, apart)
    ends = None
    if len(crossings) >= 0.5 * len(samples):
        low, high = ends_of(np.array(crossings))
        ends = float(low), float(high)
    now, later = int(np.searchsorted(grid, largest)), int(np.searchsorted(grid, target))
    now, later = min(now, len(grid) - 1), min(later, len(grid) - 1)
    here, there = (_ends(apart[at], samples[:, at]) for at in (now, later))
    return Comparison(
        names,
        names[0] if apart[now] < 0 else names[1],
        float(abs(apart[now])),
        _sign(here, apart[now]),
        crossing,
        ends,
        len(crossings) / len(samples),
        target,
        float(apart[later]),
        there,
        _cost(first, second, families, names, target),
        furthest,
        _refused(fits, names, target, furthest),
    )


def _refused(fits: dict[str, Fit], names: tuple[str, str], target: float, furthest: float) -> str:
    """Return why the families cannot be compared, or ""."""
    for name in names:
        unknown = {k: v for k, v in unknown_parameters(fits[name]).items() if k in ("K", "kappa")}
        for parameter, shown in unknown.items():
            return (
                f"{names[0]} and {names[1]} are not compared: nothing determines the law of "
                f"{name}, whose {parameter} is {shown}; fit more budgets, further apart"
            )
        at = budgets(np.array([min(target, furthest)]))
        low, high = interval(fits[name], at)
        if float(np.log(high[0] / low[0])) / 2 > LOOSE:
            return (
                f"{names[0]} and {names[1]} are not compared: the law of {name} is known to "
                f"{low[0]:.3g} to {high[0]:.3g} nats only, at {float(np.asarray(at.flops)[0]):.3g} "
                "FLOPs, where it was fitted; fit more budgets, further apart"
            )
    return ""


def budgets(flops: Array) -> Points:
    """Return points at these training FLOPs, for laws that depend on compute alone."""
    side = np.sqrt(flops / 6)
    return Points(side, side, np.ones(len(flops)), flops=flops)


def _crossing(grid: Array, apart: Array) -> float | None:
    """Return the first budget at which the sign changes, None where it does not."""
    changes = np.flatnonzero(np.sign(apart[1:]) != np.sign(apart[:-1]))
    if not len(changes):
        return None
    i = int(changes[0])
    share = apart[i] / (apart[i] - apart[i + 1])
    return float(np.exp(np.log(grid[i]) + share * np.log(grid[i + 1] / grid[i])))


def _ends(estimate: float, values: Array) -> tuple[float, float]:
    low, high = ends_around(np.array([estimate]), values[:, None])
    return float(low[0]), float(high[0])


def _sign(ends: tuple[float, float], apart: float) -> tuple[float, float]:
    return ends if apart >= 0 else (-ends[1], -ends[0])


def _cost(
    first: Fit, second: Fit, families: dict[str, Points], names: tuple[str, str], target: float
) -> float | None:
    """Return the FLOPs of two runs after which the difference at the target is significant.

    To first order: the information of one more run of each family, as noisy as its others, is
    added; larger runs are tried until the difference is 1.96 standard errors from 0.
    """
    at = budgets(np.array([target]))
    apart = abs(float(first.predict(at)[0] - second.predict(at)[0]))

    def variance(found: Fit, points: Points, extra: float | None) -> float:
        seen = jacobian(found, [found.law.prepared(points)])
        residual = np.concatenate(found.residuals)
        freedom = max(len(residual) - seen.shape[1], 1)
        noise = max(float(residual @ residual) / freedom, 1e-10)
        if extra is not None:
            more = jacobian(found, [found.law.prepared(budgets(np.array([extra])))])
            seen = np.concatenate([seen, more])
        direction = jacobian(found, [found.law.prepared(at)])[0] * float(found.predict(at)[0])
        scale = np.sqrt(np.maximum((seen**2).sum(axis=0), 1e-300))
        inverse = np.linalg.pinv((seen / scale).T @ (seen / scale), rcond=1e-12)
        along = direction / scale
        return noise * float(along @ inverse @ along)

    pairs = [(first, families[names[0]]), (second, families[names[1]])]
    if apart > 1.96 * np.sqrt(sum(variance(f, p, None) for f, p in pairs)):
        return 0.0
    smallest = max(float(np.asarray(families[n].flops).max()) for n in names)
    for budget in np.geomspace(min(smallest, target), target, 60):
        error = np.sqrt(sum(variance(f, p, float(budget)) for f, p in pairs))
        if apart > 1.96 * error:
            return 2 * float(budget)
    return None
