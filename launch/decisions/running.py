"""The runs of a decision: started here or on Slurm, and their results."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from evals.scaling.decide import Run
from evals.scaling.decide.trunks import key_of
from launch.commands import states_of
from launch.decisions.branching import as_branch
from launch.decisions.plan import Plan
from launch.grid import Grid, Member
from launch.local import run_queue
from launch.members import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    MemberState,
    check_same_settings,
    member_state,
)
from launch.slurm import submit
from pretrain.common.errors import UserError
from pretrain.run_arguments import expand_paths
from pretrain.run_directory import CONFIG_FILE, RunDirectory

Show = Callable[[str], None]


def members_of(plan: Plan, runs: Sequence[Run], done: Sequence[Run]) -> list[Member]:
    """Return the members that runs stand for; branches where others have their beginning."""
    found = []
    for run in runs:
        member = plan.members[key_of(run)]
        trunk, tokens = plan.trunks.beginning(run, done)
        if trunk is not None:
            member = as_branch(member, plan.members[key_of(trunk)], tokens)
        found.append(member)
    return found


def execute(
    plan: Plan, runs: Sequence[Run], done: Sequence[Run], options: Any, show: Show
) -> list[Run] | None:
    """Make the runs that come after those done, if they are not made yet, and return their values.

    None where they have not ended: they were stopped, or are in Slurm's queue. A failed run has no
    value, and is not started again without ``--retry-failed``.
    """
    members = members_of(plan, runs, done)
    states = make(plan, members, options, show)
    if states is None:
        return None
    found = []
    for run, member in zip(runs, members, strict=True):
        state = states[member.name]
        if state.state == FAILED:
            show(f"{member.name} failed: {state.reason}; the decision goes on without this size")
        elif state.state != DONE:
            show(f"{member.name} is {state.state}; the same command goes on")
            return None
        found.append(replace(run, value=value_of(member.config.run_directory, plan, state.state)))
    return found


def make(
    plan: Plan, members: Sequence[Member], options: Any, show: Show
) -> dict[str, MemberState] | None:
    """Make the runs of members that are not made yet; return how all are, None if submitted."""
    grid = Grid(plan.name, plan.path, plan.directory, list(members))
    states = states_of(grid)
    again = {DONE, QUEUED, RUNNING} | (set() if options.retry_failed else {FAILED})
    wanted = [member for member in members if states[member.name].state not in again]
    for member in members:
        check_same_settings(member)
    if wanted and options.cluster:
        from launch.cluster import load_cluster

        job, _ = submit(load_cluster(options.cluster), grid, wanted, options.at_once)
        show(f"submitted job {job} with {len(wanted)} runs; the same command goes on after them")
        return None
    if wanted:
        run_queue(
            wanted,
            at_once=options.at_once or 1,
            processes=options.processes,
            show=lambda member, what: show(f"{member.name}: {what}"),
        )
    return states_of(grid)


def value_of(folder: Path, plan: Plan, state: str) -> float:
    """Return a run's metric, the last one logged; not a number for a failed run."""
    if state == FAILED:
        return math.nan
    key = "valid_loss" if plan.settings.metric == "loss" else plan.settings.metric
    rows = RunDirectory(folder).read_metrics()
    values = [row[key] for row in rows if key in row]
    if not values:
        known = sorted({name for row in rows for name in row if "loss" in name or "/" in name})
        raise UserError(
            f"{folder} has no {key} in its metrics, which is decide.metric; expected one of: "
            + ", ".join(known)
        )
    return math.nan if values[-1] is None else float(values[-1])


def asked(plan: Plan, words: Sequence[str], show: Show) -> list[Run]:
    """Return finished runs of any folder that have the settings of a member of the plan.

    Raises UserError where none has.
    """
    found: dict[tuple[str, Any, int], Run] = {}
    prices = {key_of(run): run for run in plan.runs}
    for path in expand_paths(words):
        folders = [path] if (path / CONFIG_FILE).exists() else sorted(path.iterdir())
        for folder in (f for f in folders if (f / CONFIG_FILE).exists()):
            key = _match(plan, folder)
            if key is None:
                show(f"{folder}: no arm, size and seed of the plan has its settings; left out")
                continue
            config = copy.deepcopy(plan.members[key].config)
            config.directory = str(folder)
            state = member_state(Member(folder.name, {}, config)).state
            if state not in (DONE, FAILED):
                show(f"{folder}: it is {state}, expected a finished run; left out")
                continue
            value = value_of(folder, plan, state)
            found.setdefault(key, replace(prices[key], value=value))
    if not found:
        raise UserError(f"--ask: no run of {', '.join(words)} is one of the plan's, expected some")
    done: list[Run] = []
    for run in sorted(found.values()):
        done.append(plan.trunks.priced(run, done))
    return done


def _match(plan: Plan, folder: Path) -> tuple[str, Any, int] | None:
    saved = RunDirectory(folder).read_config()
    for key, member in plan.members.items():
        config = copy.deepcopy(member.config)
        if config.plan.tokens != saved.plan.tokens:
            continue
        config.directory = str(folder)
        if saved.branch is not None and saved.branch.decay == "planned":
            trunk = Path(saved.branch.run)  # of another length of the same arm, size and seed
            whole = _match(plan, trunk) if (trunk / CONFIG_FILE).exists() else None
            if whole is not None and (whole[0], whole[1][0], whole[2]) == (
                key[0],
                key[1][0],
                key[2],
            ):
                config.branch = saved.branch
        try:
            check_same_settings(Member(member.name, {}, config))
        except UserError:
            continue
        return key
    return None
