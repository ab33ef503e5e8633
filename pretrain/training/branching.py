"""Branches: the trunk's checkpoint that one begins from, and what its directory says of it.

Nothing here needs torch: whoever launches branches asks whether their trunks have come that far.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pretrain.checkpoint_folders import (
    FILES_FILE,
    STATE_FILE,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
)
from pretrain.common.errors import UserError
from pretrain.common.files import file_sha256
from pretrain.config import RunConfig, load_saved_config
from pretrain.config.branch import branch_step
from pretrain.run_directory import CONFIG_FILE, RunDirectory


def begins_from_trunk(config: RunConfig) -> bool:
    """Return whether a run is a branch that has no checkpoint of its own yet."""
    own = RunDirectory(config.run_directory).checkpoints
    return config.branch is not None and not (own.is_dir() and list_checkpoints(own))


def trunk_of(config: RunConfig) -> RunDirectory:
    """Return the directory of a branch's trunk."""
    assert config.branch is not None
    return RunDirectory(config.branch.run)


def trunk_checkpoint(config: RunConfig) -> Path:
    """Return where the checkpoint that a branch begins from lies, or will lie."""
    return trunk_of(config).checkpoints / checkpoint_name(branch_step(config))


def find_trunk_checkpoint(config: RunConfig) -> Path:
    """Return the checkpoint that a branch begins from.

    Raises UserError, with those that there are, where the trunk does not have it.
    """
    found = trunk_checkpoint(config)
    if found.is_dir():
        return found
    raise UserError(
        f"{describe_missing(config)}; python -m launch waits for a trunk that is being trained, "
        "and checkpoint.keep has one keep what its branches need"
    )


def describe_beginning(config: RunConfig) -> str:
    """Return where a branch begins, as its settings say."""
    branch, step = config.branch, branch_step(config)
    assert branch is not None
    if branch.tokens is not None:
        return f"branch.tokens is {branch.tokens}, step {step}"
    return f"branch.step is {step}"


def describe_missing(config: RunConfig) -> str:
    """Return a clause of what a branch's trunk lacks, and which checkpoints it has."""
    trunk, asked = trunk_of(config), describe_beginning(config)
    if not trunk.path.is_dir():
        return f"{asked}, but there is no run at {trunk}"
    steps = sorted(checkpoint_step(path) for path in list_checkpoints(trunk.checkpoints))
    before = config.plan.tokens_before
    there = ", ".join(f"step {s} ({before(s)} tokens)" for s in steps) or "none yet"
    return f"{asked}, of which {trunk} has no checkpoint; its checkpoints: {there}"


def note_parent(directory: RunDirectory, config: RunConfig, checkpoint: Path) -> None:
    """Write into a branch's directory what it begins from: which run, where, which hashes.

    Its trunk's schedule tells the learning rate of the steps that are the trunk's.
    """
    trunk = load_saved_config(checkpoint / CONFIG_FILE)
    step = checkpoint_step(checkpoint)
    directory.write_parent(
        {
            "run": str(trunk_of(config)),
            "checkpoint": str(checkpoint),
            "step": step,
            "tokens": config.plan.tokens_before(step),
            "files_sha256": file_sha256(checkpoint / FILES_FILE),
            "state_sha256": file_sha256(checkpoint / STATE_FILE),
            "schedule": dataclasses.asdict(trunk.schedule),
            "lr": trunk.optimizer.lr,
            "num_steps": trunk.plan.num_steps,
            **_rates_of_phases(trunk, step),
        }
    )


def _rates_of_phases(trunk: RunConfig, step: int) -> dict[str, list[float]]:
    """Return the learning rate of each step where one schedule does not tell it."""
    if not trunk.phases:
        return {}
    plan = trunk.plan
    return {"learning_rates": [plan.learning_rate(number) for number in range(step)]}


def describe_parent(parent: dict[str, Any]) -> str:
    """Return what a branch goes on from, in a few words."""
    return f"{parent['run']}, step {parent['step']:,} ({parent['tokens']:,} tokens)"
