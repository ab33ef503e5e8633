"""How long each rank takes for what it does alone, and which one keeps the others waiting."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# A rank is named where it takes so many times as long as the others, and longer by so much of a
# step: less is the noise of a machine.
RATIO = 1.25
SHARE = 0.1


class ForwardClock:
    """A clock of the forward passes of some modules, on the device where they run.

    On a GPU it is read from events, once the device has come so far.
    """

    def __init__(self, modules: Sequence[nn.Module]):
        self._seconds = 0.0
        self._begun: list[Any] = []
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._handles = [
            handle
            for module in modules
            for handle in (
                module.register_forward_pre_hook(self._begin),
                module.register_forward_hook(self._end, always_call=True),
            )
        ]

    def take(self) -> float:
        """Return the seconds since it was last read."""
        for begun, ended in self._events:
            ended.synchronize()
            self._seconds += begun.elapsed_time(ended) / 1000
        self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Take the hooks off the modules."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, inputs: Any) -> None:
        if not module.training:
            return
        self._begun.append(_event() if torch.cuda.is_available() else time.perf_counter())

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not module.training or not self._begun:
            return
        begun = self._begun.pop()
        if torch.cuda.is_available():
            self._events.append((begun, _event()))
        else:
            self._seconds += time.perf_counter() - begun


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class RankTime:
    """Seconds per step that a rank was busy while no other could make it wait."""

    rank: int
    host: str
    stage: int
    """Of the pipeline: only ranks of the same stage have the same work."""
    forward: float
    data: float
    other: float
    """Between steps: the log, and what callbacks do."""

    @property
    def total(self) -> float:
        """Return the sum."""
        return self.forward + self.data + self.other

    @classmethod
    def local(cls, rank: int, stage: int, **seconds: float) -> RankTime:
        """Return that of this process."""
        return cls(rank, socket.gethostname(), stage, **seconds)


@dataclass
class Slowest:
    """The rank that is busy the longest, against the median of the others of its stage."""

    rank: int
    ratio: float
    sentence: str | None
    """What to tell where it keeps the others waiting; None where the difference is small."""


def slowest_rank(times: Sequence[RankTime], step_seconds: float) -> Slowest | None:
    """Return the slowest rank; None where no rank has another one of its stage beside it.

    ``step_seconds`` is how long a step takes in all.
    """
    worst: tuple[float, RankTime, list[RankTime]] | None = None
    for one in times:
        peers = [t for t in times if t.stage == one.stage and t.rank != one.rank]
        if not peers:
            continue
        ratio = one.total / max(statistics.median(t.total for t in peers), 1e-9)
        if worst is None or ratio > worst[0]:
            worst = ratio, one, peers
    if worst is None:
        return None
    ratio, one, peers = worst
    usual = statistics.median(t.total for t in peers)
    if ratio < RATIO or one.total - usual < SHARE * step_seconds:
        return Slowest(one.rank, ratio, None)
    words = {
        "forward": "its forward passes",
        "data": "waiting for its data",
        "other": "what it does between steps",
    }
    excess = {
        name: getattr(one, name) - statistics.median(getattr(t, name) for t in peers)
        for name in words
    }
    most = max(excess, key=lambda name: excess[name])
    return Slowest(
        one.rank,
        ratio,
        f"rank {one.rank} on {one.host} is slow: busy for {one.total:.3g} s a step where the "
        f"others are for {usual:.3g} s ({ratio:.1f} times), mostly in {words[most]}",
    )
