"""A watchdog over processes: when one fails, hangs or is killed, all end soon.

One message names the process. Processes talk through the store that brought them together.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from types import TracebackType
from typing import Any, NoReturn

import torch.distributed as dist

from pretrain.common.errors import UserError, flush_output
from pretrain.run_directory import RunDirectory

_BEAT_SECONDS = 1.0
_SILENT_BEATS = 5  # without a beat, when connections break: the process is gone
_SILENT_SECONDS = 120.0  # the same when they do not, as NCCL's do not
_GRACE_SECONDS = 10.0  # to leave unforced after another process's failure
EXIT_FAILED = 1


class Watchdog:
    """A context around everything that several processes do together; on one it does nothing.

    An exception inside it ends all processes: with status 2 for a UserError, else with 1 and the
    traceback in the failure file of ``directory``. So does a process from which nothing has been
    heard, or which has been at the same work (see :meth:`at`), for ``timeout`` seconds.
    """

    def __init__(self, timeout: float, directory: RunDirectory):
        self._timeout, self._directory = timeout, directory
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self._work, self._ended = "starting", threading.Event()
        self._steps = 0  # advances within the current work
        self._heard: dict[int, tuple[str, float]] = {}  # last beat of each rank, and since when
        self._moved: dict[int, tuple[str, float]] = {}  # the same without the number of the beat

    def at(self, work: str) -> None:
        """Set what this process does from now on, in words that fit behind "it has been at"."""
        self._work = work

    def moving(self) -> None:
        """Report that the work advances: some kinds may take longer than the timeout in all."""
        self._steps += 1

    def __enter__(self) -> Watchdog:
        if self._size > 1:
            # Separate connections: the main thread may be waiting on the default one.
            store: Any = dist.distributed_c10d._get_default_store()
            self._store, self._exit_store = store.clone(), store.clone()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._size == 1:
            return
        if isinstance(error, Exception):
            if isinstance(error, UserError):
                self._leave(str(error), 2)
            silent = self._silent_process() if _is_lost_connection(error) else None
            if silent is not None:
                self._leave(silent, EXIT_FAILED)
            text = "".join(traceback.format_exception(error))
            reason = (str(error).strip() or "no message").splitlines()[0]
            what = f"{type(error).__name__}: {reason}"
            message = f"{self._name(self._rank)} failed at {self._work}: {what}"
            self._leave(message, EXIT_FAILED, text)
        self._ended.set()
        # A thread that the interpreter, when it ends, finds inside of the store aborts the process.
        self._thread.join(_GRACE_SECONDS)

    def _name(self, rank: int) -> str:
        host = f" on {socket.gethostname()}" if rank == self._rank else ""
        return f"process {rank} of {self._size}{host}"

    def _leave(self, message: str, status: int, details: str = "") -> NoReturn:
        """End this process; the first that ends prints the message."""
        mine = f"{self._rank} {time.time()}"
        try:
            first = self._exit_store.compare_set("failure", "", mine).decode() == mine
        except Exception:  # the process that held the store is gone as well
            first = self._rank == 0
        if first:
            if details:
                with contextlib.suppress(OSError):
                    path = self._directory.failure_file
                    path.write_text(f"{message}\n\n{details}")
                    message += f" (traceback in {path})"
            if status != 2:
                message += f"; {self._directory.describe_last_checkpoint()}"
            with contextlib.suppress(OSError):  # of a terminal that is closed
                print(f"error: {message}", file=sys.stderr, flush=True)
        flush_output()
        os._exit(status)  # nothing waits any more for a process that does not answer

    def _watch(self) -> None:
        beats = 0
        while not self._ended.wait(_BEAT_SECONDS):
            try:
                beats += 1
                self._store.set(f"beat-{self._rank}", f"{beats}:{self._steps}:{self._work}")
                if self._store.check(["failure"]):
                    if not self._ended.wait(_GRACE_SECONDS):
                        os._exit(EXIT_FAILED)
                    return
                self._listen()
            except Exception:
                # The store is gone, and with it the process or the launcher that held it.
                if not self._ended.wait(_GRACE_SECONDS):
                    self._leave("lost contact with the other processes", EXIT_FAILED)
                return
            self._check()

    def _listen(self) -> None:
        now = time.monotonic()
        # The main process listens to all, all listen to it.
        for rank in range(self._size) if self._rank == 0 else (0, self._rank):
            key = f"beat-{rank}"
            word = self._store.get(key).decode() if self._store.check([key]) else ""
            if self._heard.get(rank, ("?", 0.0))[0] != word:
                self._heard[rank] = (word, now)
            said = word.partition(":")[2]
            if self._moved.get(rank, ("?", 0.0))[0] != said:
                self._moved[rank] = (said, now)

    def _check(self) -> None:
        now = time.monotonic()
        for rank, (_, since) in self._heard.items():
            if now - since > min(self._timeout, _SILENT_SECONDS):
                self._leave(
                    f"nothing has been heard of {self._name(rank)} for {now - since:.0f} s: "
                    "it has stopped, or its machine has",
                    EXIT_FAILED,
                )
        if self._rank != 0 or now - self._moved[0][1] <= self._timeout:
            return
        # No step has ended: which rank is at other work than the majority that waits for it?
        works = {rank: said.partition(":")[2] for rank, (said, _) in self._moved.items()}
        most, _ = Counter(works.values()).most_common(1)[0]
        stuck = [rank for rank, work in works.items() if work != most] or [0]
        work = works[stuck[0]]
        who = self._name(stuck[0]) if work != most else "every process"
        self._leave(
            f"{who} has been at {work} for {now - self._moved[stuck[0]][1]:.0f} s, longer than "
            "parallel.timeout_minutes",
            EXIT_FAILED,
        )

    def _silent_process(self) -> str | None:
        """Wait some beats, and return a message about processes whose beat stopped, if any."""
        before = self._beats()
        time.sleep(_SILENT_BEATS * _BEAT_SECONDS)
        after = self._beats()
        if before is None or after is None:
            return None
        silent = [r for r in range(self._size) if r != self._rank and before[r] == after[r]]
        if not silent:
            return None
        names = ", ".join(self._name(r) for r in silent)
        return f"{names} died at {self._work}: it was killed, or its machine went down"

    def _beats(self) -> list[str] | None:
        try:
            return [
                self._exit_store.get(key).decode() if self._exit_store.check([key]) else ""
                for key in (f"beat-{rank}" for rank in range(self._size))
            ]
        except Exception:
            return None


def _is_lost_connection(error: BaseException) -> bool:
    text = f"{type(error).__name__} {error}".lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "distbackend", "socket"))
