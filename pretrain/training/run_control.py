"""The surroundings of a run's steps: threads, random numbers, clock, signals, other runs."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch

from pretrain.common.errors import UserError
from pretrain.parallel.processes import world_size

_REPEAT_SECONDS = 5.0

_training: list[str] = []  # the run that this process trains, if it trains one
_training_guard = threading.Lock()


@contextlib.contextmanager
def only_run(name: str) -> Iterator[None]:
    """Train the run ``name``, and no other in this process: process groups belong to all of it.

    Raises UserError where another run is being trained, on whichever thread.
    """
    with _training_guard:
        if _training:
            raise UserError(
                f"another Trainer of this process is training: {_training[0]}; expected one fit at "
                "a time: wait for it, or use another process"
            )
        _training.append(name)
    try:
        yield
    finally:
        _training.clear()


@contextlib.contextmanager
def threads_of_torch(count: int | None) -> Iterator[None]:
    """Let torch compute with ``count`` threads, None for as many as it does already."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


@contextlib.contextmanager
def kept_random_numbers() -> Iterator[None]:
    """Leave the global random numbers of torch and NumPy as they were before."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    state = np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            np.random.set_state(state)


def seed_step(seed: int, step: int) -> None:
    """Seed torch and NumPy from (seed, step) alone, so that there is no state to save."""
    digest = hashlib.sha256(json.dumps([seed, step]).encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    torch.manual_seed(value)
    np.random.seed(value)


class Interval:
    """A clock of tokens per second: tokens and time since it was last read, without pauses."""

    def __init__(self) -> None:
        self._tokens, self._start = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        """Add tokens that were trained on."""
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        """Return the speed since the last call, and restart the clock."""
        now = time.monotonic()
        speed = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        return speed

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count the time spent inside."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._start += time.monotonic() - start


class StopSignals:
    """A memory of SIGTERM, SIGINT, SIGHUP, SIGUSR2 or a :meth:`request`, until the step is done.

    SIGHUP comes when a terminal is closed; where it is ignored, as under nohup, it stays ignored.
    Launchers pass a signal on to processes that have it already, so a repeat is ignored; only a
    second Ctrl-C some seconds later acts at once. Python delivers signals to the main thread alone:
    on another one no handler is installed.
    """

    def __init__(self) -> None:
        self.received, self.name = False, "another process's signal"
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def request(self, reason: str) -> None:
        """Remember ``reason`` as if a signal of that name had arrived."""
        if not self.received:
            self.received, self.name, self._first = True, reason, time.monotonic()

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.received:
            self.request(signal.Signals(number).name)
        elif number == signal.SIGINT and time.monotonic() - self._first > _REPEAT_SECONDS:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an exception of one of several processes, a launcher's signal must not cut off the
        # message of what happened.
        if kind is None or world_size() == 1:
            self._restore()
