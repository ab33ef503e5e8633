"""Give the interval of a loss that a law of sizes predicts, and say what is extrapolated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.scaling.curves import Points
from evals.scaling.extrapolating import beyond
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from evals.scaling.parameters import Array


def point_interval(found: Fit, points: Any) -> tuple[Array, Array]:
    """Return the low and high ends (n,) of the 95 % interval of the loss of runs at these points.

    It holds the error of the law and the scatter of runs. Raises UserError for a fit without
    bootstrap samples.
    """
    return interval(found, points, new_run=True)


def outside(ranges: Mapping[str, Any], points: Points) -> list[str]:
    """Return in what respect each point lies outside the fitted runs, or "".

    ranges: the lowest and highest of their ``parameters`` and ``tokens``, as in a fit's domain.
    """
    reasons = []
    for n, d in zip(points.parameters, points.tokens, strict=True):
        here = (beyond(n, ranges["parameters"], "N"), beyond(d, ranges["tokens"], "D"))
        reasons.append("; ".join(reason for reason in here if reason))
    return reasons


def ranges_of(parameters: Array, tokens: Array) -> dict[str, Any]:
    """Return the ranges that :func:`outside` takes."""
    columns = {"parameters": parameters, "tokens": tokens}
    return {what: [float(x.min()), float(x.max())] for what, x in columns.items()}
