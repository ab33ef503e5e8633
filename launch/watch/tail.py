"""Read what is added to a file of lines, and notice when it is another file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20


class Tail:
    """The lines that were added to a file since it was read last.

    A run replaces its metrics when it resumes or rolls back; everything is then read again.
    """

    def __init__(self, path: Path):
        self.path = path
        self.written: float | None = None
        """When the file was written last, in seconds since 1970; None where there is none."""
        self._file: tuple[int, int] | None = None  # device and inode
        self._read, self._rest = 0, b""

    def look(self) -> tuple[bool, bool]:
        """Return whether there is something to read, and whether it is another file than before."""
        try:
            there = self.path.stat()
        except OSError:
            replaced, self._file, self.written = self._file is not None, None, None
            self._read, self._rest = 0, b""
            return replaced, replaced
        self.written = there.st_mtime
        file = (there.st_dev, there.st_ino)
        replaced = self._file is not None and (file != self._file or there.st_size < self._read)
        if file != self._file or replaced:
            self._file, self._read, self._rest = file, 0, b""
        return replaced or there.st_size > self._read, replaced

    def lines(self) -> Iterator[str]:
        """Yield the lines that are new and complete, without their ends."""
        try:
            file = self.path.open("rb")
        except OSError:
            return
        with file:
            file.seek(self._read)
            while chunk := file.read(_CHUNK):
                self._read += len(chunk)
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
