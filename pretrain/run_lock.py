"""The lock of a run directory: one run trains in a directory at a time."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pretrain.common import file_lock
from pretrain.common.errors import UserError
from pretrain.common.process_identity import identity_of


class LockedDirectory:
    """A directory that a process may hold, until it ends."""

    def __init__(self, path: Path):
        self.path = path
        self._lock_handle: int | None = None
        self._held: tuple[int, int] | None = None  # device and inode of the directory

    @property
    def lock_file(self) -> Path:
        """Return the file that the process that trains in here holds locked."""
        return self.path / ".lock"

    def take_lock(self) -> None:
        """Create the directory and hold it: one run trains in a directory at a time.

        The system releases the lock when the process ends, however it ends. Raises UserError where
        the directory cannot be written to or another run holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock_handle = file_lock.take(self.lock_file)
        except OSError as error:
            raise self._unwritable(error) from None
        if self._lock_handle is None:
            raise UserError(
                f"another process is training in {self.path}: wait for it, or choose another name"
            )
        there = self.path.stat()
        self._held = (there.st_dev, there.st_ino)
        self._write_lock_holder(self._lock_handle)

    def check_held(self) -> None:
        """Raise UserError where the directory that is held cannot be reached, or is another now.

        Files written there would be lost, or mixed with those of another run.
        """
        unreachable = self.why_unreachable()
        if unreachable is not None:
            raise UserError(unreachable)

    def why_unreachable(self) -> str | None:
        """Return the sentence that says why the directory that is held cannot be reached, if so.

        It may come back: a disk that is mounted again. Raises UserError where another was made
        instead, which does not.
        """
        if self._held is None:
            return None
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return self._lost("was removed")
        except OSError as error:
            return self._lost(f"cannot be reached any more ({error.strerror})")
        if self._held != (there.st_dev, there.st_ino):
            raise UserError(self._lost("was replaced by another"))
        return None

    def _lost(self, what: str) -> str:
        return (
            f"the run directory {self.path} {what} while the run was training in it, so nothing "
            "more can be saved; run the same command again to start from what is there now"
        )

    def _write_lock_holder(self, handle: int) -> None:
        """Write who holds the lock into its file, for whoever wants to stop the run."""
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, json.dumps(identity_of(os.getpid())).encode(), 0)
        except OSError:  # a full disk: the run is stopped as well where it was started
            pass

    def lock_holder(self) -> dict[str, Any]:
        """Return which process took the lock last; an empty dict where that is not known.

        It holds the lock where :meth:`is_locked` says so. See
        :func:`pretrain.common.process_identity.identity_of`.
        """
        try:
            values = json.loads(self.lock_file.read_bytes())
        except (OSError, ValueError):
            return {}
        return values if isinstance(values, dict) else {}

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to the run directory {self.path}: {error.strerror}")

    def release_lock(self) -> None:
        """Unlock the directory for another run; nothing happens where the lock is not held."""
        if self._lock_handle is not None:
            os.close(self._lock_handle)
            self._lock_handle = self._held = None

    def is_locked(self) -> bool:
        """Return whether a process trains in here.

        A process on another machine is not seen where the file system has no locks.
        """
        return file_lock.is_held(self.lock_file)
