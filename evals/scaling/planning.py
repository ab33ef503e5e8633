"""Plan with a fitted law: the schedule, and the size and tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from evals.scaling.curves import Curve, Points, end_of_warmup
from evals.scaling.extrapolating import outside_of, refuse_unknown
from evals.scaling.fitting import Fit
from evals.scaling.intervals import ends_around
from evals.scaling.parameters import Array
from evals.scaling.point_intervals import outside, point_interval
from evals.scaling.schedules import schedule_lr
from evals.scaling.size_laws import ChinchillaLaw
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
END_RATIOS = (0.0, 0.1)
MOST_TIMES = 10  # as long as the longest fitted run is a planned one of any size at most
NEAR = 1.05  # of the best loss: sizes of more are the best of no bootstrap sample


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
    point = Points(np.array([n]), np.array([d]), np.ones(1))
    chosen, of_loss = None, None
    if found.samples is not None:
        names = [p.name for p in law.parameters]
        rows = []
        for row in found.samples:
            pairs = zip(names, law.parameters, row, strict=True)
            if (row[-2:] > 0).all():
                rows.append(at({k: p.from_search(x) for k, p, x in pairs})[0])
        chosen = np.array(rows)
        of_loss = pair_of(point_interval(found, point))
    sizes = n * np.logspace(-2, 2, 801)
    losses = found.predict(Points(sizes, flops / (6 * sizes), np.ones(801)))
    return size_choice(
        flops, n, loss, sizes, losses, chosen, of_loss, extrapolates=outside(found.domain, point)[0]
    )


def size_choice(
    flops: float,
    n: float,
    loss: float,
    sizes: Array,
    losses: Array,
    chosen: Array | None,
    loss_interval: tuple[float, float] | None,
    schedule: str = "",
    extrapolates: str = "",
) -> SizeChoice:
    """Return the choice of ``n`` parameters with this loss, among ``sizes`` with ``losses``.

    chosen: the best size of each bootstrap sample, or None.
    """
    of_n = of_tokens = None
    if chosen is not None:
        low, high = pair_of(ends_around(np.log([n]), np.log(chosen)[:, None]))
        of_n = (float(np.exp(low)), float(np.exp(high)))
        of_tokens = (flops / (6 * of_n[1]), flops / (6 * of_n[0]) if of_n[0] else np.inf)
    alike = sizes[losses <= 1.005 * loss]
    return SizeChoice(
        flops,
        n,
        flops / (6 * n),
        loss,
        of_n,
        of_tokens,
        loss_interval,
        (float(alike.min()), float(alike.max())),
        schedule,
        extrapolates,
    )


def best_size_and_schedule(
    found: Fit, flops: float, tokens_per_step: float, peak: float, warmup_steps: int
) -> SizeChoice:
    """Return the best size from a curve law with N.

    Every size is trained for as many steps as the budget allows, with the schedule that is best at
    the best size. Raises UserError for a law without N, a budget too small for it, and one whose
    best size would be trained for more than MOST_TIMES the steps of the longest fitted run.
    """
    if not found.law.settings().get("sized"):
        raise UserError("the fitted law does not include N: fit several sizes with --sized")
    refuse_unknown(
        found, ("B", "beta"), "the best size", "fit runs of more sizes, of the largest range"
    )
    low, high = found.domain["parameters"]
    every = np.geomspace(low / 10, high * 100, 61)
    least, most = 2 * warmup_steps + 10, MOST_TIMES * found.domain["steps"][1]
    counts = [int(flops / (6 * size * tokens_per_step)) for size in every]
    if counts[0] < least:
        raise UserError(
            f"{flops:.3g} FLOPs do not suffice for {least} steps of {tokens_per_step:g} tokens, "
            f"even with {every[0]:.3g} parameters"
        )
    tried = [i for i, count in enumerate(counts) if least <= count <= most]
    sizes, steps = every[tried], [counts[i] for i in tried]
    point, best = replace(found, samples=None), len(tried) // 2
    curves, losses, schedule = list[Curve](), np.zeros(0), ""
    for _ in range(2 if tried else 0):  # the schedule at the middle size, then at the best one
        first = best_schedules(point, steps[best], [peak], warmup_steps, sizes[best])[0]
        schedule = first.name
        curves = [
            planned_curve(first.schedule, peak, count, parameters=size)
            for size, count in zip(sizes, steps, strict=True)
        ]
        losses = np.array([found.predict(curve)[-1] for curve in curves])
        best = int(np.argmin(losses))
    if not tried or (best == 0 and tried[0] > 0):
        raise UserError(
            f"the best size for {flops:.3g} FLOPs would be trained for more than {most:,} steps of "
            f"{tokens_per_step:g} tokens, {MOST_TIMES} x the longest fitted run; expected a "
            "smaller budget, or more --tokens-per-step"
        )
    chosen, of_loss = None, None
    if found.samples is not None:
        near = np.flatnonzero(losses <= NEAR * losses[best])
        samples = np.stack([found.predict_samples(curves[i])[:, -1] for i in near], axis=1)
        chosen = sizes[near][samples.argmin(axis=1)]
        of_loss = pair_of(ends_around(losses[[best]], samples[:, near == best]))
    return size_choice(
        flops,
        float(sizes[best]),
        float(losses[best]),
        sizes,
        losses,
        chosen,
        of_loss,
        schedule,
        outside_of(found, curves[best]),
    )
