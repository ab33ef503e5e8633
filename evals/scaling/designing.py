"""Find the cheapest runs from which a law could be fitted."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from evals.scaling.curves import Curve
from evals.scaling.determined import correlation_length, jacobian
from evals.scaling.fitting import Fit
from evals.scaling.parameters import Array
from evals.scaling.planning import describe, planned_curve
from pretrain.config import ScheduleConfig
from pretrain.config.schedule import fraction_of_steps

# Assumed without residuals of a fit: a run's relative spread around its law, and the number of
# consecutive losses that are correlated.
NOISE, CORRELATED = 1e-3, 10.0
POINTS = 150  # number of logged losses that a planned run is assumed to have


@dataclass
class Design:
    """A set of runs.

    ``steps`` is their total, where a constant trunk that several branch off counts once; ``error``
    the expected relative standard error of the target's predicted loss.
    """

    runs: list[str]
    steps: int
    error: float


def cheapest_design(
    found: Fit, target: Curve, tolerance: float, most: int = 3
) -> tuple[list[Design], Design | None]:
    """Find sets of up to ``most`` short runs from which the target's final loss can be predicted.

    Returns the best set for each cost, cheapest first, and the cheapest whose relative standard
    error is within ``tolerance``, or None. To first order around the fitted law: information adds
    up over runs, and their noise is that of the fit.
    """
    spread, correlated = NOISE, CORRELATED
    if found.residuals:
        residual = np.concatenate(found.residuals)
        spread = max(1.4826 * float(np.median(np.abs(residual))), 1e-5)
        correlated = correlation_length(found.residuals)
    full, peak, warmup = len(target.lr), target.peak, target.warmup + 1
    candidates = list[tuple[str, int, int, Array]]()
    for share in (0.1, 0.2, 1 / 3, 0.5, 1.0):
        steps = int(fraction_of_steps(share, full))
        if steps < 4 * warmup:
            continue
        for option in (
            ScheduleConfig("constant", warmup),
            ScheduleConfig("cosine", warmup),
            ScheduleConfig("two_stage", warmup, decay_fraction=0.5, final_ratio=0.3),
            ScheduleConfig("two_stage", warmup, decay_fraction=0.25, final_ratio=0.1),
            ScheduleConfig("wsd", warmup, decay_fraction=0.2, final_ratio=0.1),
        ):
            curve = planned_curve(option, peak, steps, points=POINTS, parameters=target.parameters)
            trunk = {"constant": steps, "cosine": 0}.get(
                option.kind, int(steps - fraction_of_steps(option.decay_fraction, steps))
            )
            matrix = jacobian(found, [found.law.prepared(curve)])
            information = matrix.T @ matrix / (spread**2 * correlated)
            label = f"{describe(option, peak)}, {steps:,} steps"
            candidates.append((label, steps, trunk, information))
    prior = np.zeros((len(found.law.parameters),) * 2)
    for i, parameter in enumerate(found.law.nonlinear):
        if parameter.prior:
            prior[i, i] = parameter.prior[1] ** -2
    end = jacobian(
        found, [found.law.prepared(replace(target, step=target.step[-1:], loss=np.ones(1)))]
    )[0]
    designs = list[Design]()
    for size in range(1, most + 1):
        for chosen in itertools.combinations(candidates, size):
            error = _standard_error(prior + sum(c[3] for c in chosen), end)
            cost = max(c[2] for c in chosen) + sum(c[1] - c[2] for c in chosen)
            designs.append(Design([c[0] for c in chosen], cost, error))
    designs.sort(key=lambda d: (d.steps, d.error))
    frontier = list[Design]()
    for design in designs:
        if not frontier or design.error < 0.9 * frontier[-1].error:
            frontier.append(design)
    good = [d for d in frontier if d.error <= tolerance]
    return frontier, good[0] if good else None


def _standard_error(information: Array, direction: Array) -> float:
    scale = np.sqrt(np.maximum(np.diag(information), 1e-30))
    scaled = information / np.outer(scale, scale)
    values, vectors = np.linalg.eigh(scaled)
    along = vectors.T @ (direction / scale)
    # Directions without information have a large variance.
    return float(np.sqrt((along**2 / np.maximum(values, 1e-12)).sum()))
