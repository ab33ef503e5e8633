"""Claims of launchers on run directories: two launchers of one grid do not start a member twice."""

from __future__ import annotations

import os

from pretrain.common import file_lock
from pretrain.run_directory import RunDirectory

_FILE = ".launching"


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
    handle = file_lock.take(directory.path / _FILE)
    return None if handle is None else Claim(handle)


def is_claimed(directory: RunDirectory) -> bool:
    """Return whether a launcher has the run."""
    return file_lock.is_held(directory.path / _FILE)
