"""What a start of a run spends its wall time on."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Literal, get_args

Kind = Literal["start", "data", "train", "wait", "save", "evaluate", "lost", "other"]
"""``start``: up to the first step. ``data``: waiting for batches. ``train``: steps. ``wait``: for
other processes, between steps. ``save``: copying checkpoints, and waiting for those that are not
written yet. ``evaluate``: validation and tasks. ``lost``: steps that a rollback undid. ``other``:
the log, and what callbacks do."""


class WallTime:
    """Seconds by what they were spent on, which add up to all of the time."""

    def __init__(self, start: float):
        """Begin at ``start``, as time.monotonic() tells it."""
        self._seconds: dict[Kind, float] = dict.fromkeys(get_args(Kind), 0.0)
        self._kind: Kind = "start"
        self._start = self._since = start
        self._steps = 0
        self.first_step: float | None = None
        """Seconds from the start to the end of the first step, once it is done."""

    def switch(self, kind: Kind) -> Kind:
        """Spend time on ``kind`` from now on, and return what it was spent on before."""
        now = time.monotonic()
        self._seconds[self._kind] += now - self._since
        before, self._kind, self._since = self._kind, kind, now
        return before

    @contextlib.contextmanager
    def spent_on(self, kind: Kind) -> Iterator[None]:
        """Count what happens inside as ``kind``."""
        before = self.switch(kind)
        try:
            yield
        finally:
            self.switch(before)

    def count_step(self) -> None:
        """Count a step that was trained."""
        self._steps += 1
        if self.first_step is None:
            self.first_step = time.monotonic() - self._start

    def undo_steps(self, count: int) -> None:
        """Count the time of the last ``count`` steps as lost, by the mean of a step."""
        count = min(count, self._steps)
        if count:
            seconds = self._seconds["train"] * count / self._steps
            self._seconds["train"] -= seconds
            self._seconds["lost"] += seconds
            self._steps -= count

    def seconds(self) -> dict[Kind, float]:
        """Return the seconds by kind, up to now."""
        self.switch(self._kind)
        return dict(self._seconds)

    def metrics(self) -> dict[str, float | None]:
        """Return what the metrics have: seconds so far, and the share that trained (goodput)."""
        seconds = self.seconds()
        return {
            "goodput": seconds["train"] / max(sum(seconds.values()), 1e-9),
            "time_to_first_step": self.first_step,
            **{f"time/{kind}": round(value, 3) for kind, value in seconds.items()},
        }

    def describe(self) -> str:
        """Return a sentence about all of the time, largest parts first."""
        seconds = self.seconds()
        total = max(sum(seconds.values()), 1e-9)
        words = {
            "start": "starting",
            "data": "waiting for data",
            "train": "training",
            "wait": "waiting for other processes",
            "save": "saving",
            "evaluate": "evaluating",
            "lost": "steps rolled back",
            "other": "logging and callbacks",
        }
        parts = sorted(seconds, key=lambda kind: -seconds[kind])
        shares = [
            f"{words[k]} {seconds[k] / total:.1%}" for k in parts if seconds[k] / total > 5e-4
        ]
        first = "" if self.first_step is None else f"; first step after {self.first_step:,.1f} s"
        return f"{total:,.1f} s: {', '.join(shares)}{first}"
