"""Give the interval of a loss that a law of sizes predicts, and say what is extrapolated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evals.scaling.curves import Points
from evals.scaling.extrapolating import beyond, unknown_parameters
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from evals.scaling.parameters import Array
from pretrain.common.errors import UserError

RATIO = "D / N"
APART = ("alpha", "beta", "A", "B", "alpha_N", "alpha_D", "w", "share")  # tell N's part from D's


def point_interval(found: Fit, points: Any) -> tuple[Array, Array]:
    """Return the low and high ends (n,) of the 95 % interval of the loss of runs at these points.

    It holds the error of the law and the scatter of runs. Raises UserError for a fit without
    bootstrap samples.
    """
    return interval(found, points, new_run=True)


def outside(ranges: Mapping[str, Any], points: Points) -> list[str]:
    """Return in what respect each point lies outside the fitted runs, or "".

    ranges: the lowest and highest of their ``parameters``, ``tokens`` and ``tokens_per_parameter``,
    as in a fit's domain.
    """
    reasons = []
    for n, d in zip(points.parameters, points.tokens, strict=True):
        here = (
            beyond(n, ranges["parameters"], "N"),
            beyond(d, ranges["tokens"], "D"),
            beyond(d / n, ranges.get("tokens_per_parameter"), RATIO),
        )
        reasons.append("; ".join(reason for reason in here if reason))
    return reasons


def refuse_unlike(found: Fit, points: Points) -> None:
    """Raise UserError for a run of another D / N, where the fitted runs do not tell N from D."""
    unknown = {n: shown for n, shown in unknown_parameters(found).items() if n in APART}
    if not unknown:
        return
    for name, far in zip(points.names, outside(found.domain, points), strict=True):
        if far.endswith(RATIO):
            parameter, shown = next(iter(unknown.items()))
            raise UserError(
                f"{name}: nothing determines its loss: it depends on {parameter}, which is "
                f"{shown}, as no fitted run has its D / N ({far}); fit runs of more ratios"
            )


def ranges_of(parameters: Array, tokens: Array) -> dict[str, Any]:
    """Return the ranges that :func:`outside` takes."""
    columns = {
        "parameters": parameters,
        "tokens": tokens,
        "tokens_per_parameter": tokens / parameters,
    }
    return {what: [float(x.min()), float(x.max())] for what, x in columns.items()}
