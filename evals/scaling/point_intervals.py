"""Give the interval of a loss that a law of sizes predicts, and say what is extrapolated."""

from __future__ import annotations

from typing import Any

from evals.scaling.curves import Points
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from evals.scaling.parameters import Array


def point_interval(found: Fit, points: Any) -> tuple[Array, Array]:
    """Return the low and high ends (n,) of the 95 % interval of the loss of runs at these points.

    It holds the error of the law and the scatter of runs. Raises UserError for a fit without
    bootstrap samples.
    """
    return interval(found, points, new_run=True)


def outside(found: Fit, points: Points) -> list[str]:
    """Return in what respect each point lies outside the fitted runs, or ""."""
    reasons = []
    for n, d in zip(points.parameters, points.tokens, strict=True):
        found_here = []
        for name, value in (("N", n), ("D", d)):
            low, high = found.domain["parameters" if name == "N" else "tokens"]
            if value > 1.001 * high:
                found_here.append(f"{value / high:.3g} x the largest {name}")
            elif value < 0.999 * low:
                found_here.append(f"{value / low:.3g} x the smallest {name}")
        reasons.append(", ".join(found_here))
    return reasons
