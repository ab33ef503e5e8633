"""Files that are at every instant the old ones or the new ones, complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import urllib.parse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 180  # bytes; file systems take 255, and names get endings


def write_json(path: Path, values: Any) -> None:
    """Write a JSON file that is at every instant the old one or the new one, complete.

    Numbers that are not finite become null: JSON has no NaN.
    """
    text = json.dumps(finite_or_null(values), indent=1, allow_nan=False)
    write_bytes(path, f"{text}\n".encode())


def finite_or_null(values: Any) -> Any:
    """Return JSON values with None for every number that is not finite."""
    if isinstance(values, dict):
        return {key: finite_or_null(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite_or_null(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def file_name(name: str) -> str:
    """Return a name of a file that no other ``name`` has: what does not belong in one is %XX.

    A long one is cut, and ends with digits of its hash instead.
    """
    quoted = urllib.parse.quote(name, safe="@,=+", errors="surrogateescape")
    if quoted.startswith("."):
        quoted = f"%2E{quoted[1:]}"
    if len(quoted) <= _LONGEST_NAME:
        return quoted
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f"{quoted[: _LONGEST_NAME - 17]}-{digest}"


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that is at every instant the old one or the new one, complete.

    Raises OSError, which names the file, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # One error, which names the file: writing says none, and closing fails once more.
        raise OSError(error.errno, error.strerror, str(path)) from None


# What the machine refuses, whatever a program does: it is full, or it may not be written to.
_REFUSALS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS),
    *(errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM),
}


def is_refused_write(error: OSError) -> bool:
    """Return whether the machine refused to write or to keep a file: a person can act on that."""
    return error.errno in _REFUSALS


def write_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Draw a figure into a file that is at every instant the old one or the new one, complete."""
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix.removeprefix("."))
    write_bytes(path, drawn.getvalue())


class LinesFile:
    """A file to which whole lines are added.

    What cannot be written is kept, and written before the next line.
    """

    def __init__(self, path: Path):
        self._path = path
        # Unbuffered, so that nothing is left to write, and to fail, when the file is closed.
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, line: str) -> None:
        """Add a line. Raises OSError, which names the file, where it cannot be written yet."""
        self._unwritten += f"{line}\n".encode()
        self.flush()

    def flush(self) -> None:
        """Write what could not be written before. Raises OSError as :meth:`write` does."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def explain_write_error(error: OSError, path: Path | None = None) -> str:
    """Return what kept a file from being written; ``path`` where the error names none."""
    found = error.filename or path
    if found is None:
        return f"cannot write a file or standard output: {error.strerror or error}"
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    # Of others nothing tells whether it was to be read or written.
    return f"cannot {'write' if full else 'use'} {found}: {write_failure(error, Path(found))}"


def write_failure(error: OSError, path: Path) -> str:
    """Return the reason of an error in writing ``path``, with the free space of a full disk."""
    reason = error.strerror or str(error)
    # Under a quota (EDQUOT) the free space of the disk says nothing.
    return reason + _room_left(path) if error.errno == errno.ENOSPC else reason


def _room_left(path: Path) -> str:
    path = path.absolute()
    found = os.statvfs(next(p for p in (path, *path.parents) if p.is_dir()))
    if found.f_files and not found.f_favail:
        return " (no file can be added there)"
    return f" ({found.f_bavail * found.f_frsize / 1e6:,.0f} MB free there)"


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
