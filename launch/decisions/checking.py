"""Recompute a decision from its runs, line by line."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from evals.scaling.decide import Campaign, Prior, Rule, Run, Target
from launch.decisions.log import LOG, PLAN, line_of, read_log
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory


def check(directory: Path) -> str:
    """Recompute every line from the plan and the runs; return what was found.

    Raises UserError, naming the first line that differs.
    """
    path = directory / PLAN
    if not path.exists():
        raise UserError(f"{directory} has no {PLAN}, expected the directory of a decision")
    content = json.loads(path.read_bytes())
    digest = content.pop("hash", None)
    text = json.dumps(content, sort_keys=True)
    found = hashlib.sha256(text.encode()).hexdigest()[:16]
    if found != digest:
        raise UserError(f"{path} has the hash {digest} and the content of {found}: it was changed")
    rows = read_log(directory, digest)
    runs = [
        Run(arm, size, tokens, seed, cost=cost) for arm, size, tokens, seed, cost in content["runs"]
    ]
    before, verdict = "", "no verdict yet"
    for number, row in enumerate(rows, 1):
        done = _done(row, runs)
        for run in done:
            _compare_value(directory, content, run, number)
        possible = [run for run in runs if _key(run) not in {_key(r) for r in done}]
        campaign = _campaign(content)
        step = campaign.step(done, possible)
        line, before_this = line_of(step, done, digest, before), json.dumps(row)
        if line != before_this:
            differs = [key for key, value in json.loads(line).items() if row.get(key) != value]
            raise UserError(
                f"{directory / LOG}, line {number} is not what its runs give: "
                f"{', '.join(differs) or 'its keys'} differ"
            )
        before = hashlib.sha256(line.encode()).hexdigest()[:16]
        if step.taken is None:
            verdict = f"it ended: {step.reason}"
    return f"{len(rows)} lines are what their runs give; {verdict}"


def _campaign(content: dict[str, Any]) -> Campaign:
    prior = dict(content["prior"])
    prior["medians"], prior["spreads"] = tuple(prior["medians"]), tuple(prior["spreads"])
    targets = {arm: Target(**target) for arm, target in content["targets"].items()}
    nats = content["decide"]["prior"] == "loss"
    return Campaign(targets, Prior(**prior), Rule(**content["rule"]), nats=nats)


def _done(row: dict[str, Any], runs: list[Run]) -> list[Run]:
    prices = {_key(run): run.cost for run in runs}
    found = []
    for arm, size, tokens, seed, value in row["runs"]:
        run = Run(arm, size, tokens, seed, math.nan if value is None else value)
        found.append(Run(arm, size, tokens, seed, run.value, prices[_key(run)]))
    return found


def _key(run: Run) -> tuple[Any, ...]:
    return run.arm, run.cell, run.seed


def _compare_value(directory: Path, content: dict[str, Any], run: Run, number: int) -> None:
    """Compare a value with the run's own, where its directory is still there."""
    folder = directory / f"{run.arm}-{run.parameters / 1e6:.3g}M-seed{run.seed}"
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
