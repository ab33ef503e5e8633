"""Fit laws, predict and plan from Python, in a notebook as by the commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from evals.scaling.allocation import best_allocation
from evals.scaling.curves import Curve, Points
from evals.scaling.extrapolating import outside_of, refuse_undetermined
from evals.scaling.fitting import Fit, Options
from evals.scaling.fitting import fit as fit_law
from evals.scaling.intervals import bootstrap, interval
from evals.scaling.laws import CURVE_LAWS, LAWS, curve_law
from evals.scaling.outliers import fit_without_outliers
from evals.scaling.parameters import Law
from evals.scaling.planning import Choice, SizeChoice, best_schedules, best_size, planned_curve
from evals.scaling.point_intervals import outside, point_interval, refuse_unlike
from evals.scaling.schedules import parse_schedule
from evals.scaling.size_laws import (
    SIZE_LAWS,
    ChinchillaLaw,
    DataConstrainedLaw,
    ExpertsLaw,
    size_law,
)
from pretrain.common.config_loader import nearest
from pretrain.common.errors import UserError

if TYPE_CHECKING:
    import pandas

SAMPLES = 200


def fit(
    law: str | Law,
    data: Any,
    options: Options | None = None,
    *,
    samples: int | None = None,
    seed: int = 0,
    keep_outliers: bool = False,
) -> Fit:
    """Fit a law by its name, such as ``intrinsic`` to curves or ``chinchilla`` to points.

    It then has the units of the data and 95 % intervals of ``samples`` bootstrap samples (200), and
    runs of a table that are outliers are left out, which ``warnings`` says. A law object is fitted
    as it is, to all data, without intervals unless ``samples`` are given. Raises UserError for
    unknown laws and data that do not suffice.
    """
    items: list[Any] = list(data) if isinstance(data, Sequence) else [data]
    if isinstance(law, Law):
        found = fit_law(law, items, options)
        return bootstrap(found, items, samples, seed) if samples else found
    if law not in LAWS:
        raise UserError(
            f"law is '{law}'{nearest(law, list(LAWS))}, expected one of {', '.join(LAWS)}"
        )
    kind = Points if law in SIZE_LAWS else Curve
    if not items or not all(isinstance(item, kind) for item in items):
        what = "one Points" if kind is Points else "one or more Curves"
        raise UserError(f"the law '{law}' is fitted to {what}, found {_kinds(items)}")
    count = SAMPLES if samples is None else samples
    if law in CURVE_LAWS:
        found = fit_law(curve_law(law, items), items, options)
        return bootstrap(found, items, count, seed) if count else found
    (points,) = items
    found, outliers, left = fit_without_outliers(
        size_law(law, points), points, options or Options("log"), keep=keep_outliers
    )
    found.warnings += [f"{o.name}: left out, {o.why}" for o in outliers]
    if count:
        bootstrap(found, [left], count, seed)
    return found


def _kinds(items: Sequence[Any]) -> str:
    return ", ".join(sorted({type(item).__name__ for item in items})) or "nothing"


def predict(
    found: Fit,
    runs: Curve | Points | None = None,
    *,
    schedule: str | None = None,
    parameters: float | None = None,
    tokens: float | None = None,
    unique_tokens: float | None = None,
    total_parameters: float | None = None,
) -> pandas.DataFrame:
    """Return what a fit predicts, with 95 % intervals where it has samples.

    A law of curves takes a :class:`Curve` or a ``schedule``, such as ``kind=wsd lr=3e-4
    steps=24000 warmup_steps=2000 decay_fraction=0.2``, and returns a row per step. A law of sizes
    takes :class:`Points` or ``parameters`` and ``tokens``, and returns a row per run. Raises
    UserError for what the law cannot predict and where nothing determines the answer;
    ``extrapolates`` tells in what respect a run is outside the fitted ones.
    """
    import pandas

    if found.law.name in CURVE_LAWS:
        if schedule is not None:
            config, peak, steps = parse_schedule(schedule)
            runs = planned_curve(config, peak, steps, points=400, parameters=parameters)
        if not isinstance(runs, Curve):
            raise UserError(f"{found.law.title} predicts a Curve or a schedule, found neither")
        refuse_undetermined(found, runs, runs.name)
        frame = pandas.DataFrame({"step": runs.step, "predicted": found.predict(runs)})
        if found.samples is not None:
            frame["low"], frame["high"] = interval(found, runs)
        frame["extrapolates"] = outside_of(found, runs)
        return frame
    if runs is None and parameters is not None and tokens is not None:
        runs = Points(
            np.array([parameters]),
            np.array([tokens]),
            np.ones(1),
            None if unique_tokens is None else np.array([unique_tokens]),
            names=["planned"],
            total_parameters=None if total_parameters is None else np.array([total_parameters]),
        )
    if not isinstance(runs, Points):
        raise UserError(f"{found.law.title} predicts Points, or parameters and tokens")
    if isinstance(found.law, DataConstrainedLaw) and runs.unique_tokens is None:
        raise UserError(f"{found.law.title} needs unique_tokens for a prediction")
    if isinstance(found.law, ExpertsLaw) and runs.total_parameters is None:
        raise UserError(f"{found.law.title} needs total_parameters for a prediction")
    refuse_unlike(found, runs)
    frame = pandas.DataFrame(
        {
            "run": list(runs.names),
            "parameters": runs.parameters,
            "tokens": runs.tokens,
            "predicted": found.predict(runs),
        }
    )
    if found.samples is not None:
        frame["low"], frame["high"] = point_interval(found, runs)
    frame["extrapolates"] = outside(found.domain, runs)
    return frame


def plan(
    found: Fit,
    *,
    flops: float | None = None,
    steps: int | None = None,
    peaks: Sequence[float] | None = None,
    warmup_steps: int | None = None,
    parameters: float | None = None,
    unique_tokens: float | None = None,
    experts_ratio: float | None = None,
) -> SizeChoice | list[Choice]:
    """Return the best size for a budget, or schedules of a length, best first.

    A law of sizes takes ``flops``, a law of repeated data also ``unique_tokens``, and one of
    experts ``experts_ratio``, the total parameters divided by the active ones. A law of curves
    takes ``steps``. Raises UserError where one is missing.
    """
    law = found.law
    if law.name in CURVE_LAWS:
        if steps is None:
            raise UserError(f"plan with {law.title} needs steps")
        warmup = warmup_steps if warmup_steps is not None else max(1, steps // 50)
        if steps < 2 * warmup + 10:
            raise UserError(f"steps is {steps}, expected at least {2 * warmup + 10}")
        return best_schedules(
            found, steps, peaks or [found.domain["peak_lr"][1]], warmup, parameters
        )
    if flops is None:
        raise UserError(f"plan with {law.title} needs flops")
    if not 0 < flops < np.inf:
        raise UserError(f"flops is {flops}, expected a number above 0")
    if isinstance(law, ChinchillaLaw):
        return best_size(found, flops)
    if isinstance(law, DataConstrainedLaw):
        if unique_tokens is None:
            raise UserError(f"plan with {law.title} needs unique_tokens, how much data there is")
        return best_allocation(found, flops, unique_tokens)
    if isinstance(law, ExpertsLaw):
        if experts_ratio is None or experts_ratio < 1:
            raise UserError(f"experts_ratio is {experts_ratio}, expected at least 1")
        return best_allocation(found, flops, experts_ratio=experts_ratio)
    raise UserError(f"{law.title} cannot plan a schedule or a size")
