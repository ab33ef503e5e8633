"""What surrounds the steps of a run: its lock, its random seeds, its clock, its stop signals."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from pretrain.common.errors import UserError

_REPEAT_SECONDS = 5.0


class RunLock:
    """One process group per run directory; the system lets go when the process ends, however."""

    def __init__(self, directory: Path):
        self.directory, self._handle = directory, -1

    def take(self) -> None:
        """Make the directory and hold it. Raises UserError where that cannot be."""
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._handle = os.open(self.directory / ".lock", os.O_CREAT | os.O_RDWR)
        except OSError as error:
            raise UserError(
                f"cannot write to the run directory {self.directory}: {error.strerror}"
            ) from None
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process is training in {self.directory}: wait for it, or choose another "
                "name"
            ) from None
        except OSError:  # a file system without locks: nothing to hold
            return

    def release(self) -> None:
        if self._handle >= 0:
            os.close(self._handle)


def seed_step(seed: int, step: int) -> None:
    """Random numbers of a step depend on (seed, step) alone, so there is no state to save."""
    digest = hashlib.sha256(json.dumps([seed, step]).encode()).digest()
    value = int.from_bytes(digest[:4], "little")
    torch.manual_seed(value)
    np.random.seed(value)


_START = time.monotonic()


def log_seconds() -> float:
    """Seconds since this process began."""
    return round(time.monotonic() - _START, 3)


class Interval:
    """Tokens per second of training since the last reading, pauses left out."""

    def __init__(self) -> None:
        self._tokens, self._start = 0, time.monotonic()

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def tokens_per_second(self) -> float:
        now = time.monotonic()
        speed = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        return speed

    def paused(self) -> Interval:
        return self

    def __enter__(self) -> None:
        self._pause = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._start += time.monotonic() - self._pause


class StopSignals:
    """Remembers SIGTERM, SIGINT or SIGUSR2 until the step is done.

    Launchers pass a signal on to processes that have it already, so a repeat is ignored; only a
    second Ctrl-C some seconds later acts at once.
    """

    def __init__(self) -> None:
        self.received, self.name = False, "another process's signal"
        self._before: dict[int, Any] = {}
        self._first = 0.0

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if number == signal.SIGINT and now - self._first > _REPEAT_SECONDS:
                self.__exit__()
                signal.raise_signal(number)
            return
        self.received, self.name, self._first = True, signal.Signals(number).name, now

    def __exit__(self, kind: type[BaseException] | None = None, *_: object) -> None:
        if kind is not None:
            return  # a launcher's signal must not cut off the telling of what happened
        for number, handler in self._before.items():
            signal.signal(number, handler)
