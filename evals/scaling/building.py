"""Make a loss curve of what a program logged: order, axis, learning rate of every step, means."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evals.scaling.curves import Curve, end_of_logged_warmup, end_of_warmup
from evals.scaling.logs import Log, Series
from evals.scaling.parameters import Array
from evals.scaling.reading import OneReading
from evals.scaling.schedules import (
    GAPS,
    MOST_STEPS,
    interpolated_lr,
    largest_difference,
    parse_schedule,
    rates_of_equal_steps,
    rises_from_0,
    schedule_lr,
)
from evals.scaling.thinning import means, smoothness, thin
from pretrain.common.errors import UserError

MISMATCH = 1e-3
MOST_TOKENS = 10**16
LONGEST = 50_000  # units of an axis that counts tokens, where nothing says how many a step has
VARIES = 0.02  # share of all tokens by which the batch size must change the axis


@dataclass
class Built:
    """A curve, and what its completion as a branch needs.

    begins: its first step of a known rate where the log begins in the middle, or None; apart:
    steps between logged losses; warmup_given: whether the steps of its warm-up are given.
    """

    curve: Curve
    begins: int | None
    apart: int
    warmup_given: bool


def counts_tokens(log: Log) -> bool:
    """Return whether a log's axis is one of tokens: by its name, or as no run has so many steps."""
    assert log.loss is not None
    largest = float(np.max(log.loss.step, initial=0))
    return log.in_tokens or MOST_STEPS < largest <= MOST_TOKENS


def token_unit(logs: list[Log]) -> float:
    """Return the tokens that count as a step for logs of tokens: 1, 2 or 5 times a power of 10."""
    last = [float(np.max(log.loss.step)) for log in logs if log.loss is not None]
    least = max(1.0, max(last) / LONGEST)
    power = 10.0 ** math.floor(math.log10(least))
    return next(unit * power for unit in (1, 2, 5, 10) if unit * power >= least * (1 - 1e-9))


def build(
    log: Log,
    reading: OneReading,
    unit: float = 1.0,
    lr: Array | None = None,
    tokens: Array | None = None,
) -> Built:
    """Clean a log and add a learning rate for every step.

    unit: tokens of a step, where the log counts tokens; lr: that of every step where it is known;
    tokens: those before each step and after the last, where it is known that steps have different
    numbers. Raises UserError where there is nothing to fit.
    """
    warnings = list[str]()
    _check(log)
    series, ends_bad = _finite(log, warnings)
    rates = log.lr.ordered() if log.lr is not None else None
    _positive(log.where, "loss", series.value, zero=False)
    if rates is not None:
        _positive(log.where, "learning rate", rates.value, zero=True)
    per_step = reading.tokens_per_step
    if counts_tokens(log):
        series, rates = _in_steps(log, series, rates, per_step or unit)
        if per_step is None:
            per_step = unit
            warnings.append(
                f"its axis counts tokens; {unit:,.0f} of them count as a step, as long as "
                "--tokens-per-step is not given"
            )
    step = series.step.astype(np.int64)
    loss = series.value * (math.log(2) if reading.unit == "bits" else 1.0)
    gaps = np.diff(step)
    if len(gaps) > 2 and gaps.max() > GAPS * np.median(gaps):
        at = int(np.argmax(gaps))
        warnings.append(f"nothing is logged between steps {step[at]:,} and {step[at + 1]:,}")
    begins = None
    if reading.schedule is not None:
        config, peak, steps = parse_schedule(reading.schedule)
        lr = schedule_lr(config, peak, max(steps, int(step[-1])))
    exact = lr is not None
    if lr is not None:
        _compare(log, rates, lr, int(step[-1]), warnings)
    else:
        lr, begins = _logged_rates(log, rates, step, reading.warmup_steps, warnings)
    if lr.max() <= 0:
        raise UserError(f"{log.where}: the learning rate is never above 0")
    warmup = reading.warmup_steps
    if warmup is None:
        warmup = end_of_warmup(lr) if exact else end_of_logged_warmup(lr)
    begin = reading.from_step if reading.from_step is not None else max(warmup, 1)
    kept = step >= max(begin, 1)
    if not kept.any():
        raise UserError(
            f"{log.where}: no loss is logged from step {begin:,} on, the last is at "
            f"{step[-1]:,}; choose an earlier --from-step"
        )
    step, loss = step[kept], loss[kept]
    clock, seen = log.clock.ordered() if log.clock is not None else None, None
    if tokens is not None:
        per_step = per_step or float(tokens[-1] - tokens[-2])
        seen = tokens / per_step
        warnings.append(f"its batch size changes; steps of {per_step:,.0f} tokens are counted")
    elif clock is not None and not counts_tokens(log):
        per_step, varying = _tokens_per_step(clock, log.clock_is, per_step, warnings)
        seen = _seen(clock, len(lr)) if varying else None
    if seen is not None:
        step, loss, lr = _onto_equal_steps(seen, step, loss, lr)
        warmup = round(seen[min(warmup, len(seen) - 1)])
        begins = None if begins is None else round(seen[begins])
    if reading.smooth:
        loss = _smoothed(loss, reading.smooth)
        warnings.append(f"the loss is an exponential mean with factor {reading.smooth}")
    elif (found := smoothness(loss)) is not None:
        warnings.append(
            f"its losses look smoothed (neighboring changes have a correlation of {found:.2f}, "
            "those of raw losses one of -0.5), which bends laws: log or export them as they are"
        )
    apart = int(np.median(np.diff(step))) if len(step) > 1 else 1
    kept_step, kept_loss = thin(step.astype(float), loss, reading.points)
    curve = Curve(
        log.name,
        kept_step.astype(np.int64),
        kept_loss,
        lr,
        warmup,
        reading.parameters or log.parameters,
        per_step,
        warnings=warnings,
        averaged=len(step) / len(kept_step),
    )
    if ends_bad:
        curve.labels["diverged"] = "its last losses are not finite"
    return Built(curve, begins, apart, reading.warmup_steps is not None)


def _finite(log: Log, warnings: list[str]) -> tuple[Series, bool]:
    """Return the losses by ascending step, without those that are none, and whether it ends so."""
    assert log.loss is not None
    series = _ordered(log.loss, warnings)
    finite = np.isfinite(series.value)
    if not finite.all():
        bad = series.step[~finite]
        warnings.append(
            f"{len(bad)} losses that are not finite (the first at step {bad[0]:,.0f}) were skipped"
        )
    if not finite.any():
        raise UserError(f"{log.where} has no finite loss")
    ends_bad = not finite[-max(1, len(finite) // 20) :].any()
    return Series(series.step[finite], series.value[finite]), ends_bad


def _in_steps(
    log: Log, series: Series, rates: Series | None, unit: float
) -> tuple[Series, Series | None]:
    """Count ``unit`` tokens as a step; losses of one step become their mean."""
    if series.step[-1] / unit > MOST_STEPS:
        raise UserError(
            f"{log.where}: its axis counts {series.step[-1]:,.0f} tokens, which are more than "
            f"{MOST_STEPS:,} steps of {unit:g} tokens; expected more --tokens-per-step"
        )
    step = np.round(series.step / unit)
    if rates is not None:
        rates = Series(np.round(rates.step / unit), rates.value).ordered()
    return Series(*means(step, series.value, step)), rates


def _check(log: Log) -> None:
    assert log.loss is not None
    for series in (log.loss, log.lr, log.clock):
        if series is None:
            continue
        step = series.step
        wrong = ~((step >= 0) & (step <= MOST_TOKENS) & (step == np.floor(step)))
        if wrong.any():
            raise UserError(
                f"{log.where}: a step is {step[wrong][0]:.16g}, expected whole numbers from 0 to "
                f"{MOST_STEPS:,}, or of tokens to {MOST_TOKENS:,}"
            )


def _positive(where: str, what: str, values: Array, zero: bool) -> None:
    wrong = values < 0 if zero else values <= 0
    if wrong.any():
        expected = "0 or more" if zero else "above 0"
        raise UserError(f"{where}: a {what} is {values[wrong][0]:g}, expected {expected}")


def _ordered(series: Series, warnings: list[str]) -> Series:
    # After a resume steps are logged again: the last time counts.
    last = {s: i for i, s in enumerate(series.step.tolist())}
    if len(last) < len(series.step):
        again = len(series.step) - len(last)
        warnings.append(f"{again} steps were logged more than once, the last time counts")
    order = np.array([last[s] for s in sorted(last)], dtype=np.int64)
    return Series(series.step[order], series.value[order])


def _compare(log: Log, rates: Series | None, lr: Array, last: int, warnings: list[str]) -> None:
    """Note where logged rates differ from those of the schedule."""
    if rates is None or not len(rates.step):
        return
    if len(lr) < last:  # the run was continued with other settings
        raise UserError(
            f"{log.where}: the loss is logged up to step {last:,}, but the schedule ends at "
            f"{len(lr):,}"
        )
    within = rates.step <= last
    steps = rates.step[within].astype(np.int64)
    difference, at = largest_difference(lr, steps, rates.value[within])
    if difference > MISMATCH:
        warnings.append(
            f"the logged learning rate differs from the schedule's by up to "
            f"{100 * difference:.2g} % of the peak, at step {at:,}"
        )


def _logged_rates(
    log: Log,
    rates: Series | None,
    step: NDArray[np.int64],
    warmup_steps: int | None,
    warnings: list[str],
) -> tuple[Array, int | None]:
    """Return the rate of every step up to the last, and where the log begins if in the middle."""
    if rates is None or not len(rates.step):
        raise UserError(
            f"{log.where}: no learning rate is logged; give the schedule, such as --schedule "
            '"kind=cosine lr=3e-4 steps=24000 warmup_steps=2000"'
        )
    known = rates.step.astype(np.int64)
    lr, notes = interpolated_lr(known, rates.value, warmup_steps)
    warnings += notes
    if len(lr) <= step[-1]:
        missing = int(step[-1]) + 1 - len(lr)
        if missing > GAPS * max(1, int(np.median(np.diff(known))) if len(known) > 1 else 1):
            warnings.append(
                f"no learning rate is logged after step {known[-1]:,}; it is taken to stay "
                f"{rates.value[-1]:.3g}"
            )
        lr = np.append(lr, np.full(missing, lr[-1]))
    apart = float(np.median(np.diff(step))) if len(step) > 1 else 1.0
    late = min(step[0], known[0]) > GAPS * apart
    middle = late and not rises_from_0(known, rates.value)
    return lr, int(known[0]) if middle else None


def _tokens_per_step(
    clock: Series, what: str, given: float | None, warnings: list[str]
) -> tuple[float | None, bool]:
    """Return the tokens of a step, and whether their number changes during the run."""
    step, seen = clock.step, clock.value
    tokens = what == "tokens"
    if len(step) < 2 or step[-1] <= 0:
        return given, False
    if np.ptp(seen) == 0:  # the column holds the tokens of each step
        return (given or float(seen[0]) or None if tokens else given), False
    rate = _last_rate(clock)
    if (np.diff(seen) < 0).any() or seen[0] < 0 or rate <= 0:
        warnings.append(f"its {what} do not grow with the step, so they are not used")
        return given, False
    counted = seen[0] > 0.05 * rate * step[0] - rate  # not from the beginning of a branch
    if counted and np.max(np.abs(seen - rate * step)) > VARIES * seen[-1] + rate:
        warnings.append(
            f"its batch size changes; steps of {rate:,.0f} {what}, as at the end, are counted"
        )
        return (given or rate if tokens else given), True
    whole = rate if not counted else float(seen[-1] / step[-1])
    if tokens and given is not None and abs(given / whole - 1) > VARIES:
        warnings.append(f"it logs {whole:,.0f} tokens per step, not the given {given:,.0f}")
    return (given or whole if tokens else given), False


def _last_rate(clock: Series) -> float:
    late = min(int(0.9 * len(clock.step)), len(clock.step) - 2)
    return float((clock.value[-1] - clock.value[late]) / (clock.step[-1] - clock.step[late]))


def _seen(clock: Series, count: int) -> Array:
    """Return what was seen before each of ``count`` steps and after, in steps like the last."""
    rate, last = _last_rate(clock), clock.step[-1]
    ends = max(count, last) + 1
    known = np.concatenate([[0.0], clock.step, [ends]])
    values = np.concatenate([[0.0], clock.value, [clock.value[-1] + rate * (ends - last)]])
    seen: Array = np.interp(np.arange(count + 1), known, values) / rate
    return seen


def _onto_equal_steps(
    seen: Array, step: NDArray[np.int64], loss: Array, lr: Array
) -> tuple[NDArray[np.int64], Array, Array]:
    """Count steps of equal size, see :func:`_seen`, of which one may hold several of the old."""
    new = np.round(seen[step])
    middle, mean = means(new, loss, new)
    return middle.astype(np.int64), mean, rates_of_equal_steps(seen, lr)


def _smoothed(loss: Array, factor: float) -> Array:
    result, mean = np.empty_like(loss), loss[0]
    for i, value in enumerate(loss):
        mean = factor * mean + (1 - factor) * value
        result[i] = mean
    return result
