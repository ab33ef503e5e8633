"""Branches wait for their trunks: ``python -m launch.branches RUN/launch.yaml`` asks for one.

It is what a Slurm job of a branch runs first. Exit status: 0 the branch can begin, 75 its trunk has
not come that far yet, 1 it never will.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from launch.claims import is_claimed
from launch.grid import Member
from launch.slurm import queue_states
from pretrain.checkpoint_folders import checkpoint_step, list_checkpoints
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.config import RunConfig, load_saved_config
from pretrain.config.branch import branch_step
from pretrain.run_directory import RunDirectory
from pretrain.training.branching import (
    begins_from_trunk,
    describe_beginning,
    describe_missing,
    trunk_checkpoint,
    trunk_of,
)

EXIT_FAILED = 1
_POLLED = 1.0  # seconds after which a trunk is looked at again


def can_begin(config: RunConfig) -> bool:
    """Return whether a run can begin: it is no branch, or its trunk has come that far."""
    return not begins_from_trunk(config) or trunk_checkpoint(config).is_dir()


def describe_wait(config: RunConfig) -> str:
    """Return what a branch waits for, in a few words."""
    return f"waits for step {branch_step(config):,} of {trunk_of(config)}"


def why_never(config: RunConfig, coming: Collection[Path] = ()) -> str | None:
    """Return why a branch will never begin as things are; None where it can, or will.

    ``coming`` are the resolved directories of runs that are about to be trained.
    """
    if can_begin(config):
        return None
    trunk = trunk_of(config)
    if trunk.path.resolve() in coming or _is_trained(trunk):
        return _why_not_saved(config, _config_of(trunk))
    if can_begin(config):  # it ended between the two looks
        return None
    if not trunk.path.is_dir():
        return f"{describe_missing(config)}; expected a run in training, or about to be"
    return f"{describe_missing(config)}, and nothing trains it; expected a run in training there"


def check_trunks(members: Sequence[Member], where: str) -> None:
    """Raise UserError for a branch that would wait for ever.

    A trunk may be another one of ``members``.
    """
    coming = coming_of(members)
    configs = {member.config.run_directory.resolve(): member.config for member in members}
    for member in members:
        reason = why_never(member.config, coming)
        if reason is None and not can_begin(member.config):
            own = configs.get(trunk_of(member.config).path.resolve())
            reason = _why_not_saved(member.config, own)
        if reason is not None:
            name = f", member {member.name}" if member.name else ""
            raise UserError(f"{where}{name}: {reason}")


def coming_of(members: Sequence[Member]) -> set[Path]:
    """Return the resolved directories of the members that will be trained.

    They can begin, or their trunks are trained or among them: two that wait for each other are not.
    """
    found, left = set[Path](), list(members)
    while True:
        new = [member for member in left if why_never(member.config, found) is None]
        if not new:
            return found
        found |= {member.config.run_directory.resolve() for member in new}
        left = [member for member in left if member not in new]


def _why_not_saved(config: RunConfig, trunk: RunConfig | None) -> str | None:
    """Return why a trunk that is trained will not save what a branch begins from, or None."""
    if trunk is None:
        return None
    step, checkpoint = branch_step(config), trunk.checkpoint
    last = trunk.plan.num_steps
    if step > last:
        return f"{describe_beginning(config)}, but {trunk.run_directory} ends with step {last}"
    milestone = checkpoint.milestone_every and step % checkpoint.milestone_every == 0
    saved = list_checkpoints(RunDirectory(trunk.run_directory).checkpoints)
    passed = any(checkpoint_step(path) > step for path in saved)
    if (
        step in trunk.kept_steps
        or step == last
        or (step % checkpoint.every == 0 and (milestone or not passed))
    ):
        return None
    return (
        f"{describe_beginning(config)}, but {trunk.run_directory} {'kept' if passed else 'saves'} "
        f"no checkpoint there; expected {config.plan.tokens_before(step)} among its "
        "checkpoint.keep"
    )


def _is_trained(trunk: RunDirectory) -> bool:
    """Return whether a process trains the trunk, or a launcher or Slurm is about to."""
    if trunk.is_locked() or is_claimed(trunk):
        return True
    launch = trunk.read_launch()
    if not launch.get("job"):
        return False
    if shutil.which("squeue") is None:  # in a container: what was noted last counts
        return launch.get("status") is None
    return bool(queue_states([_member_of(trunk)]))


def _member_of(trunk: RunDirectory) -> Member:
    config = _config_of(trunk)
    assert config is not None  # a job of it is known
    return Member("", {}, config)


def _config_of(trunk: RunDirectory) -> RunConfig | None:
    """Return the settings of a run, also of one that has not begun; None where none are noted."""
    files = (trunk.config_file, trunk.launch_config_file)
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        return None
    config = load_saved_config(file)
    config.directory = str(trunk.path)
    return config


def jobs_of_trunks(members: Sequence[Member]) -> list[str]:
    """Return the Slurm jobs that must have begun before any of ``members`` can begin, if any."""
    found = []
    for member in members:
        if can_begin(member.config):
            return []
        trunk = trunk_of(member.config)
        job = str(trunk.read_launch().get("job") or "")
        if not job or not queue_states([_member_of(trunk)]):  # such as a member of the same array
            return []
        found.append(job)
    return list(dict.fromkeys(found))


class Waiting:
    """The members of a launcher that have not begun, and which of them comes next."""

    def __init__(self, members: Sequence[Member], show: Callable[[Member, str], None]):
        self._members, self._show = list(members), show
        self._told = set[str]()
        self._looked = -math.inf

    def __bool__(self) -> bool:
        return bool(self._members)

    def next(self, running: Sequence[Member]) -> tuple[Member | None, str]:
        """Take out and return the first member that can begin, with an empty text.

        Else one that never will, with the reason; None where all may come. ``running`` are the
        launcher's own. What branches wait for is told once.
        """
        if time.monotonic() < self._looked + _POLLED:
            return None, ""
        for member in self._members:
            if can_begin(member.config):
                self._members.remove(member)
                return member, ""
        coming = coming_of([*running, *self._members])
        for member in self._members:
            reason = why_never(member.config, coming)
            if reason is not None:
                self._members.remove(member)
                return member, reason
            if member.name not in self._told:
                self._told.add(member.name)
                self._show(member, describe_wait(member.config))
        self._looked = time.monotonic()
        return None, ""


def main() -> int:
    """Ask for the branch of the command line; note why it will never begin, if so."""
    parser = argparse.ArgumentParser(prog="python -m launch.branches", description=__doc__)
    parser.add_argument("config", type=Path)
    given = parser.parse_args()
    config = load_saved_config(given.config)
    if can_begin(config):
        return 0
    reason = why_never(config)
    if reason is None:
        print(f"== {describe_wait(config)}", flush=True)
        return EXIT_STOPPED
    print(f"error: {reason}", flush=True)
    directory = RunDirectory(given.config.parent)
    directory.write_launch(ended=time.time(), status=EXIT_FAILED, reason=reason)
    return EXIT_FAILED


if __name__ == "__main__":
    from pretrain.common.errors import run_command

    run_command(main)
