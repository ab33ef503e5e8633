"""End a process whose launcher ends before the processes have met.

Once they have, :mod:`pretrain.training.watchdog` sees it.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from typing import NoReturn

_BEAT_SECONDS = 1.0
_ANSWER_SECONDS = 30.0

_met = threading.Event()
_watching: list[threading.Thread] = []


def watch_launcher() -> None:
    """End this process, from a thread, if torchrun ends before :func:`processes_met` is called.

    It would otherwise look for torchrun's store as long as a collective may take. Does nothing
    where torchrun did not start this process: what else did may end before it.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or _watching or _met.is_set():
        return
    thread = threading.Thread(target=_watch, args=(os.getppid(),), name="launcher", daemon=True)
    _watching.append(thread)
    thread.start()


def processes_met() -> None:
    """Stop watching the launcher."""
    _met.set()
    while _watching:
        _watching.pop().join()


def _watch(launcher: int) -> None:
    # It may have ended before this process had begun to watch, and its parent be another one.
    if not _store_answers():
        _leave("torchrun does not answer: it has ended, or the network between machines is blocked")
    while not _met.wait(_BEAT_SECONDS):
        if os.getppid() != launcher:
            _leave("torchrun has ended before its processes had met")


def _store_answers() -> bool:
    """Return whether torchrun's store takes a connection, now or soon.

    True where torchrun holds no store: a process of the run does, which may begin later.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + _ANSWER_SECONDS
    while time.monotonic() < until:
        try:
            socket.create_connection(address, timeout=_ANSWER_SECONDS / 3).close()
        except OSError:
            if _met.wait(_BEAT_SECONDS):
                return True
        else:
            return True
    return False


def _leave(message: str) -> NoReturn:
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            print(f"error: {message}; start it again", file=sys.stderr, flush=True)
    os._exit(1)
