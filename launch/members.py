"""What the run directories tell of a grid's members: which are done, running, stopped, failed."""

from __future__ import annotations

import copy
import dataclasses
import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.grid import Member
from pretrain.checkpoint.state import find_checkpoint, read_state
from pretrain.common.config_loader import ConfigError, flattened
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.common.files import write_json
from pretrain.config import RunConfig, legacy, load_saved_config
from pretrain.model.spec import with_sizes
from pretrain.run_directory import read_metrics

WAITING, QUEUED, RUNNING = "waiting", "queued", "running"
DONE, STOPPED, FAILED = "done", "stopped", "failed"
# Settings that a run may be started again with.
_FREE = (
    "train.steps",
    "train.tokens",
    "train.threads",
    "logging.",
    "checkpoint.",
    "validation.",
    "sample.",
    "parallel.",
    "directory",
    "name",
)


@dataclass
class MemberState:
    """step: optimizer steps done, as far as they are logged; loss: the last one logged."""

    state: str
    step: int = 0
    loss: float | None = None
    tokens_per_second: float | None = None
    reason: str = ""

    def seconds_left(self, config: RunConfig) -> float | None:
        """None where no speed is known."""
        if not self.tokens_per_second:
            return None
        train = config.train
        left = train.tokens_before(train.num_steps) - train.tokens_before(self.step)
        return max(left, 0) / self.tokens_per_second


def member_state(member: Member, *, held: bool = True) -> MemberState:
    """Read from the member's run directory alone, so from any machine that sees it; ``held``:
    look whether a process trains in there."""
    directory = member.config.run_directory
    found = MemberState(WAITING)
    if (directory / "metrics.jsonl").exists():
        rows = [row for row in read_metrics(directory) if row.get("loss") is not None]
        if rows:
            last = rows[-1]
            found.step, found.loss = last["step"], last["loss"]
            found.tokens_per_second = last.get("tokens_per_second")
    launched = launch_values(directory)
    if held and _held(directory):
        found.state = RUNNING
    elif _steps_saved(directory) >= member.config.train.num_steps:
        found.state = DONE
    elif launched.get("status") == EXIT_STOPPED:
        found.state = STOPPED
    elif launched.get("status") not in (None, 0):
        found.state, found.reason = FAILED, launched.get("reason") or ""
    elif launched or found.step:
        found.state = STOPPED
    return found


def write_launch(directory: Path, **values: Any) -> None:
    """Keep what was started, and how it ended, in ``launch.json``."""
    write_json(directory / "launch.json", {**launch_values(directory), **values})


def check_same_settings(member: Member) -> None:
    """Raise ConfigError where the run directory holds a run with other settings."""
    directory = member.config.run_directory
    if not (directory / "config.yaml").exists():
        return
    before, wanted = load_saved_config(directory / "config.yaml"), copy.deepcopy(member.config)
    legacy.keep_saved_sizes(wanted, directory)
    for config in (before, wanted):
        config.model = with_sizes(config.model, str(directory))
    was, now = (flattened(dataclasses.asdict(c)) for c in (before, wanted))
    differences = [
        f"{key} is {was.get(key)} there and {now.get(key)} here"
        for key in sorted({*was, *now})
        if was.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if differences:
        raise ConfigError(
            f"{directory} holds a run with other settings: {'; '.join(differences)}; choose "
            "another name, or remove the directory"
        )


def last_error(directory: Path) -> str:
    """The last line of the output that tells of one, or nothing."""
    try:
        lines = (directory / "output.txt").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith("error: ")), "")


def launch_values(directory: Path) -> dict[str, Any]:
    """What ``launch.json`` says; nothing where there is none."""
    try:
        values = json.loads((directory / "launch.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _held(directory: Path) -> bool:
    """Whether a process trains in there: it holds the run's lock (not seen from other machines
    where the file system has no locks)."""
    try:
        handle = os.open(directory / ".lock", os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


def _steps_saved(directory: Path) -> int:
    try:
        return read_state(find_checkpoint(directory)).step
    except UserError:
        return 0
