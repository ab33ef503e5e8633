"""Claims of launchers on run directories: two launchers of one grid do not start a member twice."""

from __future__ import annotations

import fcntl
import os
import time

from pretrain.run_directory import RunDirectory

_FILE = ".launching"
_PROBE_SECONDS = 1.0  # longer than any is_claimed holds the lock


class Claim:
    """A launcher's hold of a run, from before it starts until it has noted how it ended.

    The system ends it with the launcher, however that ends.
    """

    def __init__(self, handle: int):
        self._handle = handle

    def release(self) -> None:
        """Let other launchers start the run."""
        os.close(self._handle)


def claim(directory: RunDirectory) -> Claim | None:
    """Create the run directory and claim it; return None where another launcher has it."""
    directory.path.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory.path / _FILE, os.O_CREAT | os.O_RDWR)
    until = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return Claim(handle)
        except BlockingIOError:
            if time.monotonic() < until:  # it may be is_claimed of another process
                time.sleep(0.005)
                continue
            os.close(handle)
            return None
        except OSError:  # a file system without locks: nothing to hold
            return Claim(handle)


def is_claimed(directory: RunDirectory) -> bool:
    """Return whether a launcher has the run."""
    try:
        handle = os.open(directory.path / _FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
