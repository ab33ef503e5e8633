"""The files of a decision: the plan, and the log with a line for each step, chained by hashes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.scaling.decide.prior import Prior
from evals.scaling.decide.rule import Campaign, Rule
from evals.scaling.decide.runs import Run, Target
from evals.scaling.decide.trunks import Trunks, key_of
from pretrain.common.errors import UserError

LOG, PLAN, VERDICT, TARGETS = "log.jsonl", "plan.json", "verdict.json", "targets.json"


def hash_of(text: str) -> str:
    """Return the hash of a line, or of a plan."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_of_plan(content: Mapping[str, Any]) -> str:
    """Return the hash of a plan's content."""
    return hash_of(json.dumps(content, sort_keys=True))


def is_decision(directory: Path) -> bool:
    """Return whether a directory is a decision's."""
    return (directory / PLAN).is_file() and (directory / LOG).is_file()


def read_plan(directory: Path) -> tuple[dict[str, Any], str]:
    """Return a plan's content and its hash; raises UserError where it was changed."""
    path = directory / PLAN
    if not path.exists():
        raise UserError(f"{directory} has no {PLAN}, expected the directory of a decision")
    try:
        content = json.loads(path.read_bytes())
        digest = content.pop("hash", None)
    except (ValueError, AttributeError):
        raise UserError(f"{path} is no JSON object, expected a plan as it was written") from None
    found = hash_of_plan(content)
    if found != digest:
        raise UserError(f"{path} has the hash {digest} and the content of {found}: it was changed")
    return content, found


def read_log(directory: Path, digest: str | None = None) -> list[dict[str, Any]]:
    """Read the complete lines of a log, and check their chain; a torn last line is cut off.

    Raises UserError, naming the first line that was changed, or that another plan wrote.
    """
    path = directory / LOG
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    before, found = "", []
    for number, line in enumerate(whole.decode().splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(
                f"{path}, line {number} is no JSON object, expected a line as it was written"
            )
        if row.get("before") != before:
            raise UserError(
                f"{path}, line {number} does not follow from the line before it: one of them was "
                "changed"
            )
        if digest is not None and row.get("plan") != digest:
            raise UserError(
                f"{path}, line {number} has the plan {row.get('plan')}, expected {digest}: the "
                "file or the project changed since; choose another name"
            )
        before = hash_of(line)
        found.append(row)
    return found


def campaign_of(content: Mapping[str, Any]) -> Campaign:
    """Return the decision of a plan, with nothing run."""
    prior = dict(content["prior"])
    prior["medians"], prior["spreads"] = tuple(prior["medians"]), tuple(prior["spreads"])
    targets = {arm: Target(**target) for arm, target in content["targets"].items()}
    nats = content["decide"]["prior"] == "loss"
    return Campaign(targets, Prior(**prior), Rule(**content["rule"]), nats=nats)


def trunks_of(content: Mapping[str, Any]) -> Trunks:
    """Return which lengths of a plan are branches of each other."""
    listed = content.get("decays", [])
    return Trunks({(arm, (size, tokens)): stable for arm, size, tokens, stable in listed})


def planned_runs(content: Mapping[str, Any]) -> list[Run]:
    """Return the runs that a plan may make, each at the price of all of it."""
    return [
        Run(arm, size, tokens, seed, cost=cost) for arm, size, tokens, seed, cost in content["runs"]
    ]


def runs_of_row(row: Mapping[str, Any], planned: Sequence[Run], trunks: Trunks) -> list[Run]:
    """Return the runs that a line of the log knows, in their order, with what they cost."""
    known = {key_of(run): run for run in planned}
    found: list[Run] = []
    for arm, size, tokens, seed, value in row["runs"]:
        run = known[arm, (size, tokens), seed]
        run = replace(run, value=math.nan if value is None else value)
        found.append(trunks.priced(run, found))
    return found


def runs_left(planned: Sequence[Run], done: Sequence[Run], trunks: Trunks) -> list[Run]:
    """Return the runs that could be made next, each with the cost of what would be new in it."""
    made = {key_of(run) for run in done}
    return [trunks.priced(run, done) for run in planned if key_of(run) not in made]
