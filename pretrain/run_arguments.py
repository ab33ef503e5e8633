"""Runs as commands are given them: directories, folders and grids of runs, globs, links."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pretrain.common.errors import UserError
from pretrain.common.run_files import LAUNCH_CONFIG_FILE, METRICS_FILE
from pretrain.run_directory import RunDirectory

GRID_FILE = "grid.json"
# What `python -m launch` writes beside the runs of a grid: `runs/GRID/*` names these too.
_LAUNCHERS = (GRID_FILE, "throughput.json", "job.sh", "slurm-*.txt")


def expand_paths(words: Iterable[str | Path]) -> list[Path]:
    """Return the files and folders that ``words`` name, each once, without a launcher's own files.

    A word that names nothing as it stands is a pattern with ``*``, ``?`` or ``[...]``. Raises
    UserError where nothing matches.
    """
    found: dict[str, Path] = {}
    for word in words:
        paths = [Path(word)]
        if not os.path.lexists(word):
            # Not Path.glob, which accepts no absolute pattern.
            paths = [Path(p) for p in sorted(glob.glob(str(word)))]  # noqa: PTH207
        matched = [path for path in paths if path.exists()]
        if not matched:
            raise UserError(f"{word}: no such run directory or file")
        for path in matched:
            if not _is_launchers(path):
                found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def _is_launchers(path: Path) -> bool:
    return path.is_file() and any(path.match(name) for name in _LAUNCHERS)


def runs_of(path: Path) -> list[RunDirectory]:
    """Return the run that ``path`` is, or else every run below it that has metrics."""
    run = RunDirectory(path)
    return [run] if run.metrics_file.is_file() else runs_below(path)


def runs_below(folder: Path, *, launched: bool = False) -> list[RunDirectory]:
    """Return every run at or below ``folder`` that has metrics, ordered by path.

    ``launched``: also those that have none yet, but were launched. Links to folders are followed; a
    run that is met twice is listed once.
    """
    files_of_runs = {METRICS_FILE, *([LAUNCH_CONFIG_FILE] if launched else [])}
    found, seen = list[Path](), set[str]()
    for here, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # Links last: a run is known by its own path, if that is met too.
        links = {name for name in folders if (Path(here) / name).is_symlink()}
        folders[:] = [*sorted({*folders} - links), *sorted(links)]
        if files_of_runs.intersection(files):
            found.append(Path(here) / METRICS_FILE)
            folders[:] = [name for name in folders if name != "checkpoints"]
    return [RunDirectory(path.parent) for path in sorted(found)]


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each path: as many of its last parts as no other path ends with."""
    parts = [path.absolute().parts for path in paths]
    names = []
    for own in parts:
        count = 1
        while count < len(own) and sum(own[-count:] == other[-count:] for other in parts) > 1:
            count += 1
        names.append("/".join(own[-count:]))
    return names


def read_grid(directory: Path) -> dict[str, Any]:
    """Return what the launcher noted of the grid in ``directory``; nothing where it is no grid."""
    try:
        found = json.loads((directory / GRID_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
