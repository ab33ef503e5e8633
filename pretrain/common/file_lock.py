"""Locks on files, which the system releases when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

_PROBE_SECONDS = 1.0  # longer than any is_held holds the lock


def take(path: Path) -> int | None:
    """Create a file and lock it; return its handle, or None where another process holds it.

    Closing the handle releases the lock. Where the file system has no locks nothing is held. Raises
    OSError where the file cannot be made.
    """
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    until = time.monotonic() + _PROBE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:  # it may be is_held of another process
                time.sleep(0.005)
                continue
            os.close(handle)
            return None
        except OSError:  # a file system without locks
            pass
        return handle


def is_held(path: Path) -> bool:
    """Return whether a process holds the lock on a file; False where the file system has none."""
    try:
        handle = os.open(path, os.O_RDONLY)  # another user's file may be read only
    except OSError:
        return False
    try:
        # Shared, so that those who ask do not see each other; take waits for them.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False
