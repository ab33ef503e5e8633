"""The time that a run has taken over all of its starts.

``seconds`` of a line of the metrics begins at 0 with every start. ``total_seconds`` goes on: it
includes what earlier starts logged, also of steps that were repeated. What a start did after its
last line, until it was killed, nobody knows; it is not counted. ``starts.jsonl`` has a line for
each start: its time, the step that it continues from, and the seconds logged before it.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from typing import Any

from pretrain.run_directory import RunDirectory

_RESUMED = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d resumed from .*step-(\d+)")


def add_start(directory: RunDirectory, step: int) -> float:
    """Note that a run starts, or resumes after ``step``, and return the seconds logged before.

    To be called before lines of steps that will be repeated are dropped from the metrics.
    """
    rows = directory.read_metrics() if directory.metrics_file.exists() else []
    before = max(
        [0.0, *(start["seconds_before"] for start in read_starts(directory))]
        + [seconds for seconds in total_seconds(directory, rows) if seconds is not None]
    )
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    line = {"time": now, "step": step, "seconds_before": round(before, 3)}
    with directory.starts_file.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return before


def read_starts(directory: RunDirectory) -> list[dict[str, Any]]:
    """Return the lines of the starts; none of a run of an earlier version."""
    found = []
    if directory.starts_file.exists():
        for line in directory.starts_file.read_text(errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # cut short
                continue
            if isinstance(row, dict) and isinstance(row.get("seconds_before"), int | float):
                found.append(row)
    return found


def count_starts(directory: RunDirectory) -> int:
    """Return how often a run was started, at least once."""
    return max(len(read_starts(directory)), len(_resumed_steps(directory)) + 1)


def total_seconds(directory: RunDirectory, rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Return the seconds of training at each line of the metrics, None where it has no time.

    Runs of earlier versions have no ``total_seconds``: what each of their starts took is added up,
    as far as ``log.txt`` says from which step they resumed, or the clock began anew.
    """
    resumed = _resumed_steps(directory)
    total = list[float | None]()
    offset = before = 0.0
    current = 0
    for row in rows:
        seconds, given = row.get("seconds"), row.get("total_seconds")
        if not isinstance(seconds, int | float):
            total.append(None)
            continue
        start = max((i for i, step in enumerate(resumed, 1) if step < row["step"]), default=0)
        if start > current or seconds < before:
            offset += before
        current, before = max(start, current), float(seconds)
        total.append(float(given) if isinstance(given, int | float) else offset + before)
    return total


def _resumed_steps(directory: RunDirectory) -> list[int]:
    """Return the steps that the starts after the first resumed from, as the log file says."""
    if not directory.log_file.exists():
        return []
    lines = directory.log_file.read_text(errors="replace").splitlines()
    return [int(found[1]) for found in map(_RESUMED.match, lines) if found]
