"""Runs and grids by their directories, for commands that also take their configs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from launch.expansion import load_grid
from launch.grid import Grid, Member
from pretrain.common.config_loader import ConfigError
from pretrain.common.files import write_json
from pretrain.common.shipped_configs import find_config
from pretrain.run_arguments import GRID_FILE, distinct_names, expand_paths, read_grid
from pretrain.run_directory import CONFIG_FILE, RunDirectory

_OVERRIDE = re.compile(r"[^/=]+=.*", re.DOTALL)
_OF_ONE_RUN = ("name=", "directory=")


def load_targets(words: Sequence[str]) -> Grid:
    """Return the runs that ``words`` name, each once, as one grid.

    A word is a config, a run's directory, a grid's, or a glob of these; ``key=value``, unless there
    is a folder of that name, overrides a setting of all. Raises ConfigError, naming the word.
    """
    overrides = [w for w in words if _OVERRIDE.fullmatch(w) and not Path(w).is_dir()]
    named = [w for w in words if w not in overrides]
    if len(named) == 1 and not Path(named[0]).is_dir() and not _is_glob(named[0]):
        return load_grid(named[0], overrides)  # which says what is wrong with it
    paths = expand_paths(named)
    grids = [
        _load_directory(path, overrides) if path.is_dir() else load_grid(path, overrides)
        for path in paths
    ]
    if len(grids) == 1:
        return grids[0]
    members = {
        member.config.run_directory.resolve(): member for grid in grids for member in grid.members
    }
    folders = [member.config.run_directory for member in members.values()]
    for member, name in zip(members.values(), distinct_names(folders), strict=True):
        member.name = name
    common = Path(os.path.commonpath([folder.absolute() for folder in folders]))
    return Grid(f"{len(members)} runs", common, common, list(members.values()))


def _is_glob(word: str) -> bool:
    return not os.path.lexists(word) and any(character in word for character in "*?[")


def _load_directory(folder: Path, overrides: Sequence[str]) -> Grid:
    """Return the run of a directory, or the runs of a grid's as they were launched."""
    file = _config_of(folder)
    if file is not None:
        return _load_run(folder, file, overrides)
    noted = read_grid(folder)
    order = {name: index for index, name in enumerate(noted.get("members") or [])}
    found = [(child, _config_of(child)) for child in folder.iterdir() if child.is_dir()]
    runs = sorted(
        ((child, file) for child, file in found if file is not None),
        key=lambda run: (order.get(run[0].name, len(order)), run[0].name),
    )
    if not runs:
        raise ConfigError(
            f"{folder} is a folder without {CONFIG_FILE} and without runs in it, expected the "
            "directory of a run or of a grid"
        )
    own = [override for override in overrides if override.startswith(_OF_ONE_RUN)]
    if own:
        raise ConfigError(
            f"{folder} holds {len(runs)} runs, which {own[0]} would make one; give one of them, or "
            "the config of the grid"
        )
    members = []
    for child, file in runs:
        (member,) = _load_run(child, file, overrides).members
        members.append(Member(child.name, {}, member.config))
    return Grid(folder.resolve().name, folder, folder, members, noted.get("match"))


def _load_run(folder: Path, file: Path, overrides: Sequence[str]) -> Grid:
    grid = load_grid(file, overrides)
    (member,) = grid.members
    moved = member.config.run_directory.resolve() != folder.resolve()
    if moved and not any(override.startswith(_OF_ONE_RUN) for override in overrides):
        grid.directory, member.config.directory = folder, str(folder)
    return grid


def _config_of(folder: Path) -> Path | None:
    run = RunDirectory(folder)
    return next((f for f in (run.config_file, run.launch_config_file) if f.is_file()), None)


def note_grid(grid: Grid) -> None:
    """Write what a grid's directory says of it, and the settings of runs that have not begun.

    A grid that was itself read from directories is noted there already.
    """
    if not find_config(grid.path).is_file():
        return
    grid.directory.mkdir(parents=True, exist_ok=True)
    names = [member.name for member in grid.members]
    labels = {member.name: member.labels for member in grid.members}
    noted = {"config": str(grid.path), "match": grid.match, "members": names, "labels": labels}
    write_json(grid.directory / GRID_FILE, noted)
    for member in grid.members:
        if _config_of(member.config.run_directory) is None:
            RunDirectory(member.config.run_directory).write_launch_config(member.config)
