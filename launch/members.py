"""The states of a grid's members, read from their run directories: done, running, failed, ..."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass

from launch.claims import is_claimed
from launch.grid import Member
from pretrain.checkpoint.state import read_state
from pretrain.common.config_loader import ConfigError, flattened
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.config import RunConfig
from pretrain.model.spec import with_sizes
from pretrain.run_directory import RunDirectory, overall_speed

WAITING, QUEUED, RUNNING = "waiting", "queued", "running"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
# Settings that may change when a run is started again: how far and how it goes on.
CHANGEABLE = (
    "train.steps",
    "train.tokens",
    "train.threads",
    "train.activation_checkpointing",
    "train.segment_tokens",
    "train.nonfinite",
    "train.find_origin",
    "train.spikes.",
    "eval.",
    "data.verify",
    "logging.",
    "profile.",
    "checkpoint.",
    "validation.",
    "sample.",
    "callbacks",
    "parallel.",
    "phases",  # the trainer refuses those of the past
    "directory",
    "name",
)


@dataclass
class MemberState:
    """The state of one member, with the numbers that it logged last.

    Attributes:
        step: Of the last line about a step.
        loss: Mean over the steps since the line before it, in nats per token.
        tokens_per_second: Over all steps logged, without pauses.
    """

    state: str
    step: int = 0
    loss: float | None = None
    valid_loss: float | None = None
    valid_bits_per_byte: float | None = None
    tokens_per_second: float | None = None
    reason: str = ""

    def seconds_left(self, config: RunConfig) -> float | None:
        """Estimate the seconds until the run ends; None where no speed is known."""
        if not self.tokens_per_second:
            return None
        plan = config.plan
        left = plan.tokens - plan.tokens_before(max(self.step, config.first_step))
        return max(left, 0) / self.tokens_per_second


def member_state(member: Member, *, held: bool = True) -> MemberState:
    """Read a member's state from its run directory, on any machine that sees it.

    ``held``: also check whether a process is training there, or a launcher is at it.
    """
    directory = RunDirectory(member.config.run_directory)
    found = MemberState(WAITING)
    if directory.metrics_file.exists():
        every = directory.read_metrics()
        rows = [row for row in every if row.get("loss") is not None]
        if rows:
            last = rows[-1]
            found.step, found.loss = last["step"], last.get("loss_mean", last["loss"])
            found.tokens_per_second = overall_speed(rows)
        validations = [row for row in every if row.get("valid_loss") is not None]
        if validations:
            found.valid_loss = validations[-1]["valid_loss"]
            found.valid_bits_per_byte = validations[-1].get("valid_bits_per_byte")
    found.state, found.reason = stage_of(member.config, found.step, held=held)
    return found


def stage_of(config: RunConfig, step: int, *, held: bool = True) -> tuple[str, str]:
    """Return a run's state, and why it failed if it did; ``step`` is the last one it has logged.

    ``held``: also check whether a process is training there, or a launcher is at it.
    """
    directory = RunDirectory(config.run_directory)
    launched = directory.read_launch()
    if held and (directory.is_locked() or is_claimed(directory)):
        return RUNNING, ""
    if _is_complete(directory, config, launched.get("status")):
        return DONE, ""
    if launched.get("status") == EXIT_STOPPED:
        return STOPPED, ""
    if launched.get("status") not in (None, 0):
        return FAILED, launched.get("reason") or ""
    return STOPPED if launched or step else WAITING, ""


def check_same_settings(member: Member) -> None:
    """Raise ConfigError if the run directory holds a run with other settings."""
    directory = RunDirectory(member.config.run_directory)
    if not directory.config_file.exists():
        return
    before, wanted = directory.read_config(), copy.deepcopy(member.config)
    directory.keep_saved_sizes(wanted)
    if wanted.model.vocab_size is None:  # the data's, which the run wrote out
        wanted.model.vocab_size = before.model.vocab_size
    for config in (before, wanted):
        config.model = with_sizes(config.model, str(directory))
    was, now = (flattened(dataclasses.asdict(c)) for c in (before, wanted))
    differences = [
        f"{key} is {was.get(key)} there and {now.get(key)} here"
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key) and not key.startswith(CHANGEABLE)
    ]
    if differences:
        raise ConfigError(
            f"{directory} holds a run with other settings: {'; '.join(differences)}; choose "
            "another name, or remove the directory"
        )


def _is_complete(directory: RunDirectory, config: RunConfig, status: int | None) -> bool:
    """Return whether all steps are saved and the evaluations after the last one have results.

    Whether the data has validation text shows by earlier results, or by the ``status`` of a run
    that a signal stopped after its last step.
    """
    saved = _steps_saved(directory)
    if saved < config.plan.num_steps:
        return False
    if status == 0:  # it has looked itself
        return True
    if not directory.metrics_file.exists():
        return True
    measured = directory.measured_at(saved)
    if "valid_loss" not in measured:
        validates = any("valid_loss" in row for row in directory.read_metrics())
        if validates or status == EXIT_STOPPED:
            return False
    evaluated = any(name.startswith("eval/") for name in measured)
    return evaluated or not config.eval.tasks


def _steps_saved(directory: RunDirectory) -> int:
    found = directory.last_checkpoint()
    try:
        return 0 if found is None else read_state(found).step
    except UserError:
        return 0
