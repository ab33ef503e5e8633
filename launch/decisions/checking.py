"""Recompute a decision from its runs, line by line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from evals.scaling.decide import Run
from evals.scaling.decide.record import (
    LOG,
    campaign_of,
    hash_of,
    planned_runs,
    read_log,
    read_plan,
    runs_left,
    runs_of_row,
    trunks_of,
)
from launch.decisions.log import line_of
from launch.decisions.plan import label_of
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory


def check(directory: Path) -> str:
    """Recompute every line from the plan and the runs; return what was found.

    Raises UserError, naming the first line that differs.
    """
    content, digest = read_plan(directory)
    rows = read_log(directory, digest)
    runs, trunks = planned_runs(content), trunks_of(content)
    before, verdict = "", "no verdict yet"
    for number, row in enumerate(rows, 1):
        done = runs_of_row(row, runs, trunks)
        for run in done:
            _compare_value(directory, content, run, number)
        step = campaign_of(content).step(done, runs_left(runs, done, trunks))
        line, before_this = line_of(step, done, digest, before), json.dumps(row)
        if line != before_this:
            differs = [key for key, value in json.loads(line).items() if row.get(key) != value]
            raise UserError(
                f"{directory / LOG}, line {number} is not what its runs give: "
                f"{', '.join(differs) or 'its keys'} differ"
            )
        before = hash_of(line)
        if step.taken is None:
            verdict = f"it ended: {step.reason}"
    return f"{len(rows)} lines are what their runs give; {verdict}"


def _compare_value(directory: Path, content: dict[str, Any], run: Run, number: int) -> None:
    """Compare a value with the run's own, where its directory is still there."""
    folder = directory / label_of(run, several=len(content["decide"].get("lengths", [1.0])) > 1)
    if not folder.is_dir() or not math.isfinite(run.value):
        return
    metric = content["decide"]["metric"]
    key = "valid_loss" if metric == "loss" else metric
    values = [row[key] for row in RunDirectory(folder).read_metrics() if key in row]
    if not values or float(f"{values[-1]:.9g}") != run.value:
        raise UserError(
            f"{directory / LOG}, line {number} has {run.value} of {folder}, which has "
            f"{values[-1] if values else 'none'}"
        )
