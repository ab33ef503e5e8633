"""Plan with a fitted law: the schedule, the size and tokens, and the runs to fit it to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import minimize_scalar

from evals.scaling.curves import Curve, Points, end_of_warmup
from evals.scaling.fitting import Fit, correlation_length, jacobian
from evals.scaling.intervals import ends_of
from evals.scaling.parameters import Array
from evals.scaling.schedules import schedule_lr
from evals.scaling.size_laws import ChinchillaLaw
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig
from pretrain.config.schedule import fraction_of_steps

FRACTIONS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
END_RATIOS = (0.0, 0.1)
# Assumed without residuals of a fit: a run's relative spread around its law, and the number of
# consecutive losses that are correlated.
NOISE, CORRELATED = 1e-3, 10.0
POINTS = 150  # number of logged losses that a planned run is assumed to have


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

    behind: interval (low, high) of the loss above the best choice's, or None without bootstrap
    samples; extrapolates: in what respect it is outside the fitted runs, or "".
    """

    name: str
    loss: float
    schedule: ScheduleConfig
    peak: float
    steps: int
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

    The length of WSD's decay is optimized.
    """
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
            apart = found.predict_samples(curve)[:, -1] - first
            low, high = ends_of(apart)
            choice.behind = float(low), float(high)
    return [choice for choice, _ in choices]


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


def outside_of(found: Fit, curve: Curve) -> str:
    """Return in what respect a curve is outside the fitted runs, or ""."""
    reasons, domain = list[str](), found.domain
    if not domain.get("steps"):
        return ""
    if curve.step[-1] > 1.001 * domain["steps"][1]:
        reasons.append(f"{curve.step[-1] / domain['steps'][1]:.1f} x the longest fitted run")
    low, high = domain["peak_lr"]
    if not 0.999 * low <= curve.peak <= 1.001 * high:
        reasons.append(f"peak outside {low:.3g} to {high:.3g}")
    sizes = domain.get("parameters")
    if sizes and curve.parameters and not 0.999 * sizes[0] <= curve.parameters <= 1.001 * sizes[1]:
        reasons.append(f"N outside {sizes[0]:.3g} to {sizes[1]:.3g}")
    return "; ".join(reasons)


@dataclass
class SizeChoice:
    """The compute-optimal size; intervals are (low, high) or None.

    ``alike`` is the range (low, high) of sizes whose predicted loss is within 0.5 % of the best.
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


def best_size(found: Fit, flops: float) -> SizeChoice:
    """Return the N and D of the lowest loss for ``flops`` = 6 N D, from a fitted Chinchilla law.

    Raises UserError for other laws.
    """
    law = found.law
    if not isinstance(law, ChinchillaLaw):
        raise UserError(f"{law.title} is not a law of size and tokens")

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
        rows = np.array(
            [
                at(
                    {
                        k: p.from_search(x)
                        for k, p, x in zip(names, law.parameters, row, strict=True)
                    }
                )
                for row in found.samples
                if (row[-2:] > 0).all()
            ]
        )
        low, high = ends_of(rows)
        ends = [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
    sizes = n * np.logspace(-2, 2, 801)
    points = Points(sizes, flops / (6 * sizes), np.ones(801))
    alike = sizes[found.predict(points) <= 1.005 * loss]
    return SizeChoice(
        flops, n, d, loss, ends[0], ends[1], ends[2], (float(alike.min()), float(alike.max()))
    )


def best_size_and_schedule(
    found: Fit, flops: float, tokens_per_step: float, peak: float, warmup_steps: int
) -> SizeChoice:
    """Return the best size from a curve law with N.

    Every size is trained for as many steps as the budget allows, with its best schedule. Raises
    UserError for a law without N or too small a budget.
    """
    if found.domain.get("parameters") is None:
        raise UserError("the fitted law does not include N: fit several sizes with --sized")

    def choose(size: float) -> tuple[float, str]:
        steps = int(flops / (6 * size * tokens_per_step))
        if steps < 2 * warmup_steps + 10:
            return float("inf"), ""
        first = best_schedules(found, steps, [peak], warmup_steps, size)[0]
        return first.loss, first.name

    low, high = found.domain["parameters"]
    sizes = np.geomspace(low / 10, high * 100, 61)
    losses = np.array([choose(n)[0] for n in sizes])
    best = int(np.argmin(losses))
    if not np.isfinite(losses[best]):
        raise UserError(
            f"{flops:.3g} FLOPs do not suffice for {2 * warmup_steps + 10} steps of "
            f"{tokens_per_step:g} tokens, even with {sizes[0]:.3g} parameters"
        )
    n = float(sizes[best])
    alike = sizes[losses <= 1.005 * losses[best]]
    return SizeChoice(
        flops,
        n,
        flops / (6 * n),
        float(losses[best]),
        None,
        None,
        None,
        (float(alike.min()), float(alike.max())),
        choose(n)[1],
    )


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
