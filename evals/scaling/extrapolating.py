"""How far a prediction is beyond the fitted runs, and whether anything determines it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from evals.scaling.curves import Curve
from evals.scaling.determined import jacobian
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from pretrain.common.errors import UserError
from pretrain.common.screen import readable

WIDE = (
    0.02  # half of an interval of log loss, beyond which it says nothing about schedules or sizes
)
BLIND = 10.0  # error of log loss, to first order, that means no information at all
MARGIN = 1.02  # beyond the fitted range that is worth a note: the last step is often not logged
MOVED = 2.0  # times by which an unknown parameter moves a best size that it determines
MATTERS = 1e-4  # change of log loss by a parameter's own size or standard error


def beyond(value: float, ends: Sequence[float] | None, what: str) -> str:
    """Return how many times a value is beyond the fitted range, or ""."""
    if ends is None or ends[0] / MARGIN <= value <= MARGIN * ends[1]:
        return ""
    if value > ends[1]:
        return f"{value / ends[1]:.3g} x the largest fitted {what}"
    return f"{value / ends[0]:.2g} x the smallest fitted {what}"


def outside_of(found: Fit, curve: Curve) -> str:
    """Return in what respect a curve is outside the fitted runs, or ""."""
    domain = found.domain
    if not domain.get("steps"):
        return ""
    reasons = []
    if curve.step[-1] > MARGIN * domain["steps"][1]:
        reasons.append(f"{curve.step[-1] / domain['steps'][1]:.3g} x the longest fitted run")
    reasons.append(beyond(curve.peak, domain["peak_lr"], "peak"))
    if curve.parameters:
        reasons.append(beyond(curve.parameters, domain.get("parameters"), "N"))
    return "; ".join(reason for reason in reasons if reason)


def unknown_parameters(found: Fit) -> dict[str, str]:
    """Return the parameters whose standard error is larger than themselves, with both.

    One that the search knows by its logarithm is unknown where that is uncertain by more than 1.
    What priors tell counts.
    """
    unknown = {}
    for parameter in found.law.parameters:
        error = found.standard_errors.get(parameter.name)
        if error is None:
            continue
        if parameter.prior and found.options.priors:  # fits were once saved without
            error = min(error, parameter.prior[1])
        value = found.values[parameter.name]
        if error <= (1.0 if parameter.log else abs(value)):
            continue
        shown = f"{readable(value)}, with a standard error of {readable(error)}"
        if parameter.log:
            shown = f"{readable(value)}, to a factor of {np.exp(min(error, 99)):.3g}"
        unknown[parameter.name] = shown
    return unknown


def refuse_unknown(found: Fit, needed: Sequence[str], answer: str, remedy: str) -> None:
    """Raise UserError where ``answer`` depends on a parameter that nothing determines."""
    for name, shown in unknown_parameters(found).items():
        if name in needed:
            raise UserError(
                f"nothing determines {answer}: it depends on {name}, which is {shown}; {remedy}"
            )


def refuse_moved(found: Fit, best: Callable[[Fit], float], answer: str, remedy: str) -> None:
    """Raise UserError where ``best``, a size, moves with a parameter that nothing determines.

    That is by a factor of 2 or more within the parameter's own size.
    """
    unknown = unknown_parameters(found)
    theta = len(found.theta)
    for i, parameter in enumerate(found.law.parameters):
        if parameter.name not in unknown:
            continue
        values = np.concatenate([found.theta, found.beta])
        away = 1.0 if parameter.log else abs(values[i])
        ends = values[i] + np.array([-away, away])
        least, most = parameter.to_search(max(parameter.low, 1e-12)), parameter.high
        ends = np.clip(ends, least, parameter.to_search(most) if most < np.inf else np.inf)
        sizes = []
        for values[i] in ends:
            moved = replace(found, theta=values[:theta].copy(), beta=values[theta:].copy())
            sizes.append(best(moved))
        if sizes[0] > MOVED * sizes[1] or sizes[1] > MOVED * sizes[0]:
            raise UserError(
                f"nothing determines {answer}: it depends on {parameter.name}, which is "
                f"{unknown[parameter.name]}; {remedy}"
            )


def refuse_undetermined(found: Fit, data: Any, name: str) -> None:
    """Raise UserError where nothing determines the predicted loss at the end of ``data``.

    That is where it depends on a parameter whose standard error is larger than itself, and where
    its interval is wider than 2 % of it on either side.
    """
    unknown = unknown_parameters(found)
    if not unknown:
        return
    row = jacobian(found, [found.law.prepared(data)])[-1]
    for parameter, by in zip(found.law.parameters, row, strict=True):
        if parameter.name not in unknown:
            continue
        error, value = found.standard_errors[parameter.name], found.values[parameter.name]
        if abs(by) * max(abs(value), error) < MATTERS:
            continue
        half = abs(by) * error
        # Samples of a parameter that no fitted loss depends on stay where they are.
        if found.samples is not None and half < BLIND:
            low, high = interval(found, data)
            half = float(np.log(high[-1] / low[-1])) / 2
        if half > WIDE:
            raise UserError(
                f"{name}: nothing determines its loss: it depends on {parameter.name}, which is "
                f"{unknown[parameter.name]}; fit runs that differ in what it acts on"
            )
