"""Rebuild the learning rate of every step, from settings or from logged values."""

from __future__ import annotations

import math
import re

import numpy as np
from numpy.typing import NDArray

from evals.scaling.parameters import Array
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import RunConfig, ScheduleConfig
from pretrain.config.plan import RunPlan
from pretrain.config.schedule import learning_rate
from pretrain.run_directory import RunDirectory

MOST_STEPS = 10_000_000  # of a run; the learning rate of each is computed
SPARSE, UNSURE = 0.02, 0.003  # shares of a run between two logged rates that are worth a note
STRAIGHT, BEND = 0.002, 0.01  # changes over one gap, as shares of the peak, of lines and of corners
GAPS = 5  # medians between logged steps that count as a gap, or as a beginning in the middle
ASSUMED = "assumed to be a warm-up from 0"
JUMP = 0.2  # relative change between two logged steps that counts as abrupt


def schedule_lr(config: ScheduleConfig, peak: float, num_steps: int) -> Array:
    """Return the learning rate (num_steps,) of every step, as training computes it."""
    return np.array([learning_rate(config, peak, step, num_steps) for step in range(num_steps)])


def run_lr(config: RunConfig, run: RunDirectory) -> Array:
    """Return the learning rate of every step of a run; the first ones of a branch are its trunk's.

    Raises ConfigError where a schedule is not known.
    """
    plan = config.plan
    lr = np.array([plan.learning_rate(step) for step in range(plan.num_steps)])
    parent = run.read_parent()
    if parent and "learning_rates" in parent:
        lr[: parent["step"]] = parent["learning_rates"]
    elif parent:
        schedule = build_config(ScheduleConfig, parent["schedule"], str(run.parent_file))
        trunk = schedule_lr(schedule, parent["lr"], parent["num_steps"])
        lr[: parent["step"]] = trunk[: parent["step"]]
    return lr


def tokens_per_step(plan: RunPlan) -> float:
    """Return the tokens of a run's last step, those of every step of a law."""
    return float(plan.batch_tokens(plan.num_steps - 1))


def tokens_of_steps(plan: RunPlan) -> Array | None:
    """Return the tokens (T + 1,) before each of T steps and after the last one.

    None where all steps have equally many.
    """
    sizes = np.array([plan.batch_tokens(step) for step in range(plan.num_steps)], dtype=float)
    if (sizes == sizes[0]).all():
        return None
    return np.concatenate([[0.0], np.cumsum(sizes)])


def rates_of_equal_steps(seen: Array, lr: Array) -> Array:
    """Return the learning rate of every step of equal size.

    seen: (T + 1,) such steps before each of T steps of other sizes, and after the last one; lr:
    the rates of those.
    """
    whole = np.arange(max(math.ceil(seen[-1]), 1))
    return lr[np.clip(np.searchsorted(seen, whole, side="right") - 1, 0, len(lr) - 1)]


def parse_schedule(text: str) -> tuple[ScheduleConfig, float, int]:
    """Parse ``kind=wsd lr=3e-4 steps=24000 warmup_steps=2000 decay_fraction=0.2 ...``.

    The names are those of ``schedule:`` in a run's config, ``lr`` and ``steps``. Returns the
    schedule's settings, the peak learning rate and the number of steps. Raises UserError, or its
    subclass ConfigError, for a text that is no such schedule.
    """
    where, values = f"schedule '{text}'", dict[str, str]()
    for word in text.split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"{where}: found '{word}', expected NAME=VALUE")
        values[name] = value
    try:
        peak, steps = float(values.pop("lr")), int(float(values.pop("steps")))
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing") from None
    except (ValueError, OverflowError):
        raise UserError(f"{where}: expected numbers for lr and steps") from None
    if not (0 < peak < math.inf and 1 <= steps <= MOST_STEPS):
        raise UserError(
            f"{where}: lr is {peak} and steps {steps}, expected lr above 0 and 1 to {MOST_STEPS:,} "
            "steps"
        )
    numbers = {n: _number(v) for n, v in values.items()}
    return build_config(ScheduleConfig, numbers, where), peak, steps


def _number(text: str) -> int | float | str:
    if re.fullmatch(r"\d+", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text


def interpolated_lr(
    step: NDArray[np.int64], logged: Array, warmup_steps: int | None
) -> tuple[Array, list[str]]:
    """Return the learning rate of every step from logged values, and sentences on assumptions.

    It is linear between logged steps; where two straight parts meet between two of them, so do
    their lines. A change by more than 20 % between two of them, with a constant learning rate
    before or after it, is abrupt and placed in the middle. Before the first logged step it rises
    from 0 over ``warmup_steps`` (None: all of them), then has the first value.
    """
    knots, values = _with_bends(step, logged)
    lr = np.interp(np.arange(step[-1] + 1), knots, values)
    notes = []
    gaps = np.diff(step)
    if len(gaps) and gaps.max() > max(1, SPARSE * step[-1]):
        notes.append(
            f"the learning rate was logged every {int(np.median(gaps)):,} steps and interpolated"
        )
    flat = np.abs(np.diff(logged)) <= 1e-6 * logged.max()
    jumps = []
    for i in np.flatnonzero(np.abs(np.diff(logged)) > JUMP * np.maximum(logged[1:], logged[:-1])):
        if (i > 0 and flat[i - 1]) or (i + 1 < len(flat) and flat[i + 1]):
            middle = (step[i] + step[i + 1] + 1) // 2
            lr[step[i] : middle], lr[middle : step[i + 1] + 1] = logged[i], logged[i + 1]
            if step[i + 1] - step[i] > max(1, UNSURE * step[-1]):
                jumps.append(f"{step[i]:,} and {step[i + 1]:,}; assumed to jump at {middle:,}")
    if jumps:
        more = f", and likewise {len(jumps) - 1} more times" if len(jumps) > 1 else ""
        notes.append(f"the learning rate jumps between steps {jumps[0]}{more}")
    first = int(step[0])
    rising = rises_from_0(step, logged)
    if warmup_steps is not None and warmup_steps <= first:
        lr[:warmup_steps] = logged[0] * np.arange(1, warmup_steps + 1) / max(warmup_steps, 1)
        lr[warmup_steps:first] = logged[0]
    elif first > 1 or (first == 1 and rising):
        lr[:first] = logged[0] * np.arange(first) / first
        if not rising:
            notes.append(
                f"the steps before {first:,}, the first logged one, are {ASSUMED} (change this "
                "with --warmup-steps, or --branch-of, if it is a branch)"
            )
    return lr, notes


def rises_from_0(step: NDArray[np.int64], logged: Array) -> bool:
    """Return whether a log begins in a warm-up: rising, and if late on a line from 0."""
    if len(logged) < 2 or logged[1] <= logged[0]:
        return False
    apart = step[1] - step[0]
    begun = logged[0] - step[0] * (logged[1] - logged[0]) / apart
    return bool(step[0] <= GAPS * apart or abs(begun) <= JUMP * logged[0])


def _with_bends(step: NDArray[np.int64], logged: Array) -> tuple[Array, Array]:
    """Add the ends of ramps that lie between logged steps: where the lines to both sides meet."""
    knots, values = step.astype(float), logged
    if len(step) < 5:
        return knots, values
    slope = np.diff(values) / np.diff(knots)
    near = STRAIGHT * float(logged.max())
    inside = np.arange(1, len(slope) - 1)
    before, after = slope[inside - 1], slope[inside + 1]
    width = np.diff(knots)[inside]
    turn = before - after
    with np.errstate(divide="ignore", invalid="ignore"):
        rise = values[inside + 1] - values[inside] - after * width
        at = np.where(turn != 0, rise / turn, -1.0)  # steps after the logged one
    # Straight on both sides as far as that is known, and it must be known of one.
    bend_before = np.full(len(inside), np.nan)
    bend_before[1:] = np.abs(slope[inside[1:] - 2] - before[1:]) * width[1:]
    bend_after = np.full(len(inside), np.nan)
    bend_after[:-1] = np.abs(slope[inside[:-1] + 2] - after[:-1]) * width[:-1]
    straight = ~(bend_before > near) & ~(bend_after > near)
    straight &= ~(np.isnan(bend_before) & np.isnan(bend_after))
    found = (
        straight & (at > 0.5) & (at < width - 0.5) & (np.abs(turn) * width > BEND * logged.max())
    )
    places = np.round(knots[inside[found]] + at[found])
    new = values[inside[found]] + before[found] * (places - knots[inside[found]])
    order = np.argsort(np.concatenate([knots, places]), kind="stable")
    return np.concatenate([knots, places])[order], np.concatenate([values, new])[order]


def largest_difference(lr: Array, step: NDArray[np.int64], logged: Array) -> tuple[float, int]:
    """Return the largest difference of logged and rebuilt rates, as a share of the peak, and where.

    A log may hold the rate of the previous or of the next step.
    """
    best: tuple[float, int] | None = None
    for shift in (0, 1):
        at = np.clip(step - shift, 0, len(lr) - 1)
        difference = np.abs(lr[at] - logged) / lr.max()
        worst = int(np.argmax(difference))
        if best is None or difference[worst] < best[0]:
            best = float(difference[worst]), int(step[worst])
    assert best is not None
    return best
