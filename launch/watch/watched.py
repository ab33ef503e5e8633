"""All runs that are followed: finding them, and telling a page what has changed."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm import queue_states
from launch.watch.followed import FollowedRun
from pretrain.common.errors import UserError
from pretrain.run_arguments import distinct_names, expand_paths, read_grid, runs_below
from pretrain.run_directory import RunDirectory

_REFRESHED = 1.0  # seconds between two looks at the files, however many pages ask
_SEARCHED = 5.0  # between two searches for runs, more where a search takes long
_ASKED = 20.0  # between two questions to Slurm


class Watched:
    """The runs at and below folders, kept up to date when someone asks."""

    def __init__(self, words: Sequence[str]):
        """Find the runs. Raises UserError where a word names no folder, or there is no run."""
        self._words = list(words)
        self._lock = threading.Lock()
        self._runs: dict[str, FollowedRun] = {}  # by resolved directory
        self._version, self._token = 0, uuid.uuid4().hex[:8]
        self._refreshed = self._search_again = self._asked = 0.0
        self._queue: dict[str, tuple[str, str]] = {}
        for path in expand_paths(words):
            if not path.is_dir():
                raise UserError(f"{path} is a file, expected the directory of a run, or of runs")
        self._search()
        if not self._runs:
            raise UserError(
                f"{', '.join(words)}: there is no run in it, expected the directory of a run or of "
                "a grid, or a folder of them, such as runs"
            )

    def __len__(self) -> int:
        return len(self._runs)

    @property
    def title(self) -> str:
        """Return what is watched."""
        return ", ".join(self._words)

    def state(self, since: str = "") -> dict[str, Any]:
        """Return what has changed after ``since``, the ``version`` of an earlier state.

        Everything, where that is of another process or none. ``order`` names the runs there are.
        """
        with self._lock:
            self._refresh()
            token, _, number = since.partition("-")
            known = int(number) if token == self._token and number.isdecimal() else -1
            runs = [run for run in self._runs.values() if run.told]
            return {
                "version": f"{self._token}-{self._version}",
                "title": self.title,
                "now": time.time(),
                "order": [run.name for run in runs],
                "runs": [run.told for run in runs if run.version > known],
            }

    def _refresh(self) -> None:
        now = time.monotonic()
        if self._refreshed and now - self._refreshed < _REFRESHED:
            return
        if now >= self._search_again:
            self._search()
        if not self._asked or now - self._asked > _ASKED:
            self._asked = now
            members = (run.member for run in self._runs.values())
            self._queue = queue_states([member for member in members if member is not None])
        version = self._version + 1
        for run in self._runs.values():
            # A file or a folder may go while it is read: the next search leaves the run out.
            with contextlib.suppress(OSError, UserError):
                if run.refresh(self._queue):
                    run.version = self._version = version
        self._refreshed = time.monotonic()

    def _search(self) -> None:
        """Look for runs; those that are followed already stay as they are."""
        begun, found = time.monotonic(), dict[str, RunDirectory]()
        folders: list[Path] = []
        for word in self._words:
            with contextlib.suppress(UserError):  # a folder that was there before
                folders += [path for path in expand_paths([word]) if path.is_dir()]
        for folder in folders:
            for run in runs_below(folder, launched=True):
                found.setdefault(os.path.realpath(run.path), run)
        order = _in_grids_order(found)
        names = distinct_names([found[key].path for key in order])
        if len(folders) == 1:
            own = folders[0].absolute()
            inside = [found[key].path.absolute() for key in order]
            names = [str(p.relative_to(own)) if p != own else p.name for p in inside]
        runs = {}
        for key, name in zip(order, names, strict=True):
            before, directory = self._runs.get(key), found[key]
            group = str(directory.path.parent)
            if before is None or (before.name, before.group) != (name, group):
                before = FollowedRun(directory, name, group)
            runs[key] = before
        self._runs = runs
        now = time.monotonic()
        self._search_again = now + max(_SEARCHED, 20 * (now - begun))


def _in_grids_order(found: dict[str, RunDirectory]) -> list[str]:
    """Return the keys of runs: folder by folder, members of a grid as it lists them."""
    places: dict[Path, dict[str, int]] = {}
    for run in found.values():
        folder = run.path.parent
        if folder not in places:
            members = read_grid(folder).get("members") or []
            places[folder] = {str(name): index for index, name in enumerate(members)}

    def place(key: str) -> tuple[str, int, str]:
        run = found[key]
        listed = places[run.path.parent]
        return str(run.path.parent), listed.get(run.name, len(listed)), run.name

    return sorted(found, key=place)
