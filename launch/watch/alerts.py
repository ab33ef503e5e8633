"""What someone who watches runs should look at: found in a run's log and in its metrics."""

from __future__ import annotations

import re
import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from pretrain.training.rank_times import RATIO

BAD, WARNING, NOTE = "bad", "warning", "note"
_LEVELS = (BAD, WARNING, NOTE)
_TIMED = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d) (.*)")
_STEP = re.compile(r"step (\d+)/\d+  ")
_NUMBERS = re.compile(r"\d[\d.,e+-]*")
_SAVE, _SLOW = "(checkpoint.retries)", " is slow: busy for "
# What the log says of steps: the first that matches names the kind, of which the last is shown.
_LOGGED = (
    (BAD, "origin", re.compile(r": (the first \S+ is |run again)")),
    (BAD, "stopped", re.compile(r"not finite, stopped|times already .*stopped")),
    (WARNING, "not finite", re.compile(r"not finite, skipped|loss (nan|-?inf)\b")),
    (WARNING, "spike", re.compile(r"is a spike|^rolled back to step")),
    (NOTE, "newton", re.compile(r"Newton's method did not converge")),
)
_WINDOW = 5  # logged losses whose mean is compared
_LEAST_RISE = 0.3  # nats per token
_QUIET, _QUIET_AT_FIRST = 300.0, 900.0  # seconds without a line, later and before the first
_PAUSES = 3  # times the longest pause so far is too long


@dataclass
class Alert:
    """A sentence about a run; ``time`` is that of the log, in its time zone."""

    level: str
    text: str
    time: str = ""
    count: int = 1

    def described(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


def worst_first(alerts: list[Alert]) -> list[Alert]:
    """Return alerts by level, the latest of a level first."""
    newest = sorted(alerts, key=lambda alert: alert.time, reverse=True)
    return sorted(newest, key=lambda alert: _LEVELS.index(alert.level))


@dataclass
class LogAlerts:
    """Alerts from the lines of ``log.txt``, one of each kind with how often it was said."""

    stopped: str = ""
    """When the log said last that the run stops."""
    _found: dict[str, Alert] = field(default_factory=dict)
    _steps: dict[str, int] = field(default_factory=dict)  # the last one logged before it
    _step: int = 0

    def add(self, line: str) -> None:
        """Look at a line of the log."""
        timed = _TIMED.fullmatch(line)
        if timed is None:  # a later line of a message
            return
        when, text = f"{timed[1]}T{timed[2]}", timed[3]
        if "stopped" in text:
            self.stopped = when
        if step := _STEP.match(text):
            self._step = int(step[1])
            return
        level, kind = WARNING, "warning"
        if text.startswith("warning: "):
            text = text.removeprefix("warning: ")
            kind = _SAVE if text.endswith(_SAVE) else _SLOW if _SLOW in text else text
        else:
            found = next((x for x in _LOGGED if x[2].search(text)), None)
            if found is None:
                return
            level, kind, _ = found
        key = _NUMBERS.sub("#", kind)
        before = self._found.get(key)
        self._found[key] = Alert(level, text, when, 1 if before is None else before.count + 1)
        self._steps[key] = self._step

    def since(self, start: str, *, saved: int, ratio: float | None) -> list[Alert]:
        """Return what was said since the time ``start`` and is not over.

        ``saved`` is the step of the latest checkpoint: failures to save before it are over, and so
        is a slow rank where ``ratio`` is small, by how much the slowest one is slower now.
        """
        over = set()
        if self._steps.get(_SAVE, saved + 1) <= saved:
            over.add(_SAVE)
        if ratio is not None and ratio < RATIO:
            over.add(_SLOW)
        return [a for key, a in self._found.items() if key not in over and a.time >= start]


class LossAlerts:
    """Alerts from the losses of ``metrics.jsonl``: not finite, or rising."""

    def __init__(self) -> None:
        self._window: deque[float] = deque(maxlen=_WINDOW)
        self._first: float | None = None
        self._lowest = (0.0, 0)  # and its step
        self._not_finite: int | None = None
        self._rise: Alert | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Look at a line about a step: its loss is null where it was not finite."""
        loss, step = row.get("loss_mean", row["loss"]), row["step"]
        if loss is None:
            self._not_finite = step
            return
        self._not_finite = None
        self._window.append(loss)
        if len(self._window) < _WINDOW:
            return
        mean = statistics.fmean(self._window)
        if self._first is None:
            self._first = mean
        if self._first == mean or mean <= self._lowest[0]:
            self._lowest = mean, step
        lowest, at = self._lowest
        self._rise = None
        if mean - lowest > max((self._first - lowest) / 2, _LEAST_RISE):
            self._rise = Alert(
                BAD,
                f"step {step}: the loss diverges, {mean:.4f} after {lowest:.4f} at step {at} "
                f"(means of {_WINDOW} lines)",
            )

    def alerts(self) -> list[Alert]:
        """Return what is true at the last line."""
        if self._not_finite is not None:
            return [Alert(BAD, f"step {self._not_finite}: the loss is not finite")]
        return [] if self._rise is None else [self._rise]


def silence(written: float, longest_pause: float | None) -> Alert | None:
    """Return an alert where a run in training has not written for too long.

    ``written`` is when it did last, in seconds since 1970, ``longest_pause`` the longest between
    two of its lines so far; None where it has not written two.
    """
    usual = _QUIET_AT_FIRST if longest_pause is None else max(_QUIET, _PAUSES * longest_pause)
    if time.time() - written <= usual:
        return None
    since = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    return Alert(WARNING, f"has written nothing since {since}, though a process trains it")
