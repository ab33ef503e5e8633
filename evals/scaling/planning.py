"""Plan with a fitted law: the schedule, and the size and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from evals.scaling.curves import Curve, Points, end_of_warmup
from evals.scaling.extrapolating import beyond, outside_of, refuse_unknown
from evals.scaling.fitting import Fit
from evals.scaling.intervals import ends_around, interval
from evals.scaling.parameters import Array
from evals.scaling.schedules import schedule_lr
from evals.scaling.size_laws import ChinchillaLaw
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
END_RATIOS = (0.0, 0.1)


def planned_curve(
    schedule: ScheduleConfig,
    peak: float,
    steps: int,
    *,
    parameters: float | None = None,
    tokens_per_step: float | None = None,
    points: int = 1,
    name: str = "",
) -> Curve:
    """Return the curve of a future run: a loss of 1 at ``points`` steps, evenly up to the last."""
    lr = schedule_lr(schedule, peak, steps)
    warmup = end_of_warmup(lr)
    first = max(warmup + 1, 1) if points > 1 else steps
    at = np.unique(np.linspace(min(first, steps), steps, points).astype(np.int64))
    return Curve(
        name or describe(schedule, peak),
        at,
        np.ones(len(at)),
        lr,
        warmup,
        parameters,
        tokens_per_step,
    )


def describe(schedule: ScheduleConfig, peak: float) -> str:
    """Describe a schedule in a few words."""
    words: list[str] = [schedule.kind]
    if schedule.kind == "wsd":
        words.append(f"{schedule.decay} over {schedule.decay_fraction:.0%}")
    if schedule.kind == "two_stage":
        words.append(f"drop after {1 - schedule.decay_fraction:.0%}")
    if schedule.kind != "constant":
        words.append(f"to {schedule.final_ratio * peak:.3g}")
    return f"{' '.join(words)}, peak {peak:.3g}"


@dataclass
class Choice:
    """A schedule and its predicted final loss.

    interval: (low, high) of the loss, behind: of the loss above the best choice's, both None
    without bootstrap samples; extrapolates: in what respect it is outside the fitted runs, or "".
    """

    name: str
    loss: float
    schedule: ScheduleConfig
    peak: float
    steps: int
    interval: tuple[float, float] | None = None
    behind: tuple[float, float] | None = None
    extrapolates: str = ""


def best_schedules(
    found: Fit,
    steps: int,
    peaks: Sequence[float],
    warmup_steps: int,
    parameters: float | None = None,
) -> list[Choice]:
    """Return schedules of ``steps`` steps by their predicted final loss, best first.

    The length of WSD's decay is optimized. Raises UserError where nothing determines what a falling
    learning rate gains.
    """
    refuse_unknown(
        found,
        ("C",),
        "which schedule is best",
        "fit a run whose learning rate falls, and a longer run at a constant one",
    )
    choices = list[tuple[Choice, Curve]]()
    for peak in peaks:
        options = [ScheduleConfig("constant", warmup_steps)]
        for ratio in END_RATIOS:
            options += [
                ScheduleConfig(kind, warmup_steps, final_ratio=ratio)
                for kind in ("cosine", "linear")
            ]
            for decay in ("linear", "sqrt", "exponential"):
                if decay == "exponential" and ratio == 0:
                    continue
                options.append(
                    _best_decay(
                        found,
                        ScheduleConfig("wsd", warmup_steps, decay, 0.2, ratio),
                        peak,
                        steps,
                        parameters,
                    )
                )
        for option in options:
            curve = planned_curve(option, peak, steps, parameters=parameters)
            choices.append((_choice(found, option, peak, steps, curve), curve))
    choices.sort(key=lambda pair: pair[0].loss)
    if found.samples is not None:
        first = found.predict_samples(choices[0][1])[:, -1]
        for choice, curve in choices:
            losses = found.predict_samples(curve)[:, -1]
            choice.interval = pair_of(ends_around(np.array([choice.loss]), losses[:, None]))
            apart = np.array([choice.loss - choices[0][0].loss])
            choice.behind = pair_of(ends_around(apart, (losses - first)[:, None]))
    return [choice for choice, _ in choices]


def pair_of(ends: tuple[Array, Array]) -> tuple[float, float]:
    """Return the interval of one number."""
    return float(ends[0][0]), float(ends[1][0])


def _choice(found: Fit, option: ScheduleConfig, peak: float, steps: int, curve: Curve) -> Choice:
    outside = outside_of(found, curve)
    return Choice(
        describe(option, peak),
        float(found.predict(curve)[-1]),
        option,
        peak,
        steps,
        extrapolates=outside,
    )


def _best_decay(
    found: Fit, option: ScheduleConfig, peak: float, steps: int, parameters: float | None
) -> ScheduleConfig:
    longest = 1 - option.warmup_steps / steps

    def loss(fraction: float) -> float:
        tried = replace(option, decay_fraction=float(fraction))
        curve = planned_curve(tried, peak, steps, parameters=parameters)
        return float(found.predict(curve)[-1])

    tried = [f for f in FRACTIONS if f < longest] or [longest / 2]
    best = min(tried, key=loss)
    result = minimize_scalar(
        loss, bounds=(best / 2, min(best * 2, longest)), method="bounded", options={"xatol": 0.002}
    )
    return replace(option, decay_fraction=float(result.x if result.fun < loss(best) else best))


@dataclass
class SizeChoice:
    """The compute-optimal size; intervals are (low, high) or None.

    ``alike`` is the range (low, high) of sizes whose predicted loss is within 0.5 % of the best;
    ``extrapolates`` tells in what respect the best is outside the fitted runs, or is "".
    """

    flops: float
    parameters: float
    tokens: float
    loss: float
    parameters_interval: tuple[float, float] | None
    tokens_interval: tuple[float, float] | None
    loss_interval: tuple[float, float] | None
    alike: tuple[float, float]
    schedule: str = ""
    extrapolates: str = ""


def best_size(found: Fit, flops: float) -> SizeChoice:
    """Return the N and D of the lowest loss for ``flops`` = 6 N D, from a fitted Chinchilla law.

    Raises UserError for other laws.
    """
    law = found.law
    if not isinstance(law, ChinchillaLaw):
        raise UserError(f"{law.title} is not a law of size and tokens")
    refuse_unknown(
        found,
        ("alpha", "beta", "A", "B"),
        "the best size",
        "fit runs of more sizes and more numbers of tokens for each",
    )

    def at(values: dict[str, float]) -> tuple[float, float, float]:
        n, d = law.optimum(values, np.array([flops]))
        raw = law.derived(values)
        loss = values["E"] + raw["raw A"] * n ** -values["alpha"]
        loss = loss + raw["raw B"] * d ** -values["beta"]
        return float(n[0]), float(d[0]), float(loss[0])

    n, d, loss = at(found.values)
    ends: list[tuple[float, float] | None] = [None, None, None]
    if found.samples is not None:
        names = [p.name for p in law.parameters]
        rows = []
        for row in found.samples:
            pairs = zip(names, law.parameters, row, strict=True)
            if (row[-2:] > 0).all():
                rows.append(at({k: p.from_search(x) for k, p, x in pairs})[:2])
        logs = np.log(np.array(rows).reshape(-1, 2))
        best = Points(np.array([n]), np.array([d]), np.ones(1))
        low, high = ends_around(np.log([n, d]), logs)
        ends = [
            *((float(a), float(b)) for a, b in zip(np.exp(low), np.exp(high), strict=True)),
            pair_of(interval(found, best)),
        ]
    sizes = n * np.logspace(-2, 2, 801)
    points = Points(sizes, flops / (6 * sizes), np.ones(801))
    alike = sizes[found.predict(points) <= 1.005 * loss]
    return SizeChoice(
        flops,
        n,
        d,
        loss,
        ends[0],
        ends[1],
        ends[2],
        (float(alike.min()), float(alike.max())),
        extrapolates=outside_of_points(found, n, d),
    )


def outside_of_points(found: Fit, parameters: float, tokens: float) -> str:
    """Return in what respect a run is outside the fitted ones, or ""."""
    reasons = [
        beyond(parameters, found.domain.get("parameters"), "N"),
        beyond(tokens, found.domain.get("tokens"), "D"),
    ]
    return "; ".join(reason for reason in reasons if reason)


def best_size_and_schedule(
    found: Fit, flops: float, tokens_per_step: float, peak: float, warmup_steps: int
) -> SizeChoice:
    """Return the best size from a curve law with N.

    Every size is trained for as many steps as the budget allows, with its best schedule. Raises
    UserError for a law without N or too small a budget.
    """
    if found.domain.get("parameters") is None:
        raise UserError("the fitted law does not include N: fit several sizes with --sized")

    low, high = found.domain["parameters"]
    sizes = np.geomspace(low / 10, high * 100, 61)
    steps = [int(flops / (6 * size * tokens_per_step)) for size in sizes]
    enough = [i for i, count in enumerate(steps) if count >= 2 * warmup_steps + 10]
    if not enough:
        raise UserError(
            f"{flops:.3g} FLOPs do not suffice for {2 * warmup_steps + 10} steps of "
            f"{tokens_per_step:g} tokens, even with {sizes[0]:.3g} parameters"
        )
    sizes, steps = sizes[enough], [steps[i] for i in enough]
    choices, curves = [], []
    for size, count in zip(sizes, steps, strict=True):
        point = replace(found, samples=None)
        first = best_schedules(point, count, [peak], warmup_steps, size)[0]
        choices.append(first)
        curves.append(planned_curve(first.schedule, peak, count, parameters=size))
    losses = np.array([choice.loss for choice in choices])
    best = int(np.argmin(losses))
    n = float(sizes[best])
    ends: list[tuple[float, float] | None] = [None, None, None]
    if found.samples is not None:
        samples = np.stack([found.predict_samples(curve)[:, -1] for curve in curves], axis=1)
        logs = np.log(sizes)[samples.argmin(axis=1)]
        of_n = pair_of(ends_around(np.log([n]), logs[:, None]))
        total = flops / 6
        ends = [
            (float(np.exp(of_n[0])), float(np.exp(of_n[1]))),
            (total / float(np.exp(of_n[1])), total / float(np.exp(of_n[0]))),
            pair_of(ends_around(losses[[best]], samples[:, [best]])),
        ]
    alike = sizes[losses <= 1.005 * losses[best]]
    return SizeChoice(
        flops,
        n,
        flops / (6 * n),
        float(losses[best]),
        ends[0],
        ends[1],
        ends[2],
        (float(alike.min()), float(alike.max())),
        choices[best].name,
        choices[best].extrapolates,
    )
