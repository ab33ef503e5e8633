"""The folder of a run's checkpoints: their names, and which of them was saved last.

Nothing here needs torch: see :mod:`pretrain.run_directory`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from pathlib import Path

from pretrain.common.files import write_bytes

STATE_FILE = "state.json"  # of a checkpoint
FILES_FILE = "files.json"  # of a checkpoint: the size and sha256 of its other files
LATEST = "latest"  # beside the checkpoints: the name of the one that was saved last
CHECKPOINT = re.compile(r"step-(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Return the name of the folder that holds the checkpoint of ``step``."""
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """Return the step that the name of a checkpoint's folder says."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the complete checkpoints in ``directory``, newest first."""
    named = (p for p in directory.glob("step-*") if CHECKPOINT.fullmatch(p.name))
    return sorted((p for p in named if p.is_dir()), reverse=True)


def mark_latest(checkpoint: Path) -> None:
    """Make ``checkpoint`` the one that its run continues from."""
    write_bytes(checkpoint.parent / LATEST, checkpoint.name.encode())


def next_save_number(directory: Path) -> int:
    """Return the number of the next save into ``directory``, which its ``state.json`` keeps."""
    numbers = [_save_number(path) for path in list_checkpoints(directory)]
    return 1 + max((n for n in numbers if n is not None), default=0)


def latest_in(directory: Path) -> Path | None:
    """Return the checkpoint that was saved last, which need not be that of the last step.

    It is told by the numbers of the saves; the mark, written after a checkpoint, may have been cut
    off, and decides only among checkpoints of earlier versions, which have no number.
    """
    found = list_checkpoints(directory) if directory.is_dir() else []
    if len(found) < 2:
        return found[0] if found else None
    marked = marked_in(directory)

    def age(path: Path) -> tuple[float, bool, str]:
        number: float | None = _save_number(path)
        if number is None:  # damaged: if it may be the last one, loading it shall say so
            number = math.inf if path.name == (marked or found[0].name) else -1
        return number, path.name == marked, path.name

    return max(found, key=age)


def marked_in(directory: Path) -> str | None:
    """Return the name that the file of the latest checkpoint holds, if it is the name of one."""
    try:
        name = (directory / LATEST).read_bytes().decode(errors="replace").strip()
    except OSError:
        return None
    return name if CHECKPOINT.fullmatch(name) else None


def _save_number(checkpoint: Path) -> int | None:
    """Return the number of a checkpoint among its run's saves; None where it is damaged.

    Those of earlier versions have 0.
    """
    content = unchanged(checkpoint / STATE_FILE)
    return None if content is None else int(json.loads(content).get("save", 0))


def unchanged(path: Path) -> bytes | None:
    """Return the content of a checkpoint's file; None where it is not what was written."""
    try:
        written = json.loads((path.parent / FILES_FILE).read_bytes())[path.name]["sha256"]
        content = path.read_bytes()
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return content if hashlib.sha256(content).hexdigest() == written else None
