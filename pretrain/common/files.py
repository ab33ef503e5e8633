"""Files that are at every instant the old ones or the new ones, complete."""

from __future__ import annotations

import hashlib
import json
import math
import os
import urllib.parse
from pathlib import Path
from typing import Any

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
    """Write a file that is at every instant the old one or the new one, complete."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


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
