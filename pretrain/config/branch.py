"""Branches: a run that goes on from a step of another one, its trunk."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pretrain.common.config_loader import Config, ConfigError, setting
from pretrain.config.schedule import SCHEDULES

if TYPE_CHECKING:
    from pretrain.config.run import RunConfig


@dataclass
class BranchConfig(Config):
    """Go on from a step of another run, the trunk: exactly one of ``step`` and ``tokens`` is set.

    The branch takes over its weights, optimizer state, position in the data and random numbers, and
    counts its steps and tokens from the trunk's first one. The trunk is only read.
    """

    run: str
    """The trunk's directory."""
    step: int | None = setting(None, minimum=1)
    """Optimizer steps of the trunk after which the branch begins."""
    tokens: int | None = setting(None, minimum=1)
    """Tokens after which it begins, rounded up to whole steps."""
    decay: Literal["here", "planned"] = setting("here")
    """Where the decay of ``wsd`` and the drop of ``two_stage`` begin: ``here``, at the branch,
    whatever ``schedule.decay_fraction`` is, or as ``planned`` by it."""


def branch_step(config: RunConfig) -> int:
    """Return the number of the trunk's steps that a branch begins after."""
    branch = config.branch
    assert branch is not None
    if branch.step is not None:
        return branch.step
    return config.plan.step_at(branch.tokens or 0)


def settle_branch(config: RunConfig, where: str) -> None:
    """Check a branch's settings, and let its decay begin where it does, in place.

    Raises ConfigError naming ``where`` and the field.
    """
    branch = config.branch
    if branch is None:
        return
    if (branch.step is None) == (branch.tokens is None):
        raise ConfigError(
            f"{where}: branch.step is {branch.step} and branch.tokens {branch.tokens}, expected "
            "exactly one of them to be set"
        )
    if config.initialize is not None:
        raise ConfigError(
            f"{where}: branch and initialize are both set, expected one of them: a branch has the "
            "weights of its trunk"
        )
    if Path(branch.run).resolve() == config.run_directory.resolve():
        raise ConfigError(
            f"{where}: branch.run is {branch.run}, the directory of this run itself; expected "
            "another run's, or another name"
        )
    if (config.train.steps is None) == (config.train.tokens is None):
        return  # refused with the budget
    step, count = branch_step(config), config.plan.num_steps
    if step >= count:
        given = f"step is {step}" if branch.tokens is None else f"tokens is {branch.tokens}"
        raise ConfigError(
            f"{where}: branch.{given}, expected less than the whole run has, of trunk and branch: "
            f"{count} steps, {config.plan.tokens} tokens"
        )
    if SCHEDULES[config.schedule.kind].decays_at_end and branch.decay == "here":
        config.schedule = dataclasses.replace(
            config.schedule, decay_fraction=(count - step) / count
        )
