"""Mirrors of a run's metrics: Weights & Biases, TensorBoard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any, Protocol

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.config import LoggingConfig
from pretrain.run_directory import RunDirectory


class Tracker(Protocol):
    """A mirror of every line of the metrics, fed by the main process alone."""

    def record(self, values: dict[str, Any]) -> None:
        """Add one line of metrics, which has its ``step``; numbers that are not finite are None."""

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps than ``step``, which will be repeated."""

    def close(self) -> None:
        """Flush and close."""


def open_trackers(
    config: LoggingConfig, directory: RunDirectory, step: int, *, repeats: bool
) -> list[Tracker]:
    """Return the trackers that ``logging`` asks for, which continue from ``step``.

    ``repeats``: lines of later steps were recorded before, and come again. Raises UserError where
    the library of a tracker is not installed.
    """
    trackers: list[Tracker] = []
    try:
        if config.wandb != "disabled":
            trackers.append(WandbTracker(config, directory, step, repeats=repeats))
        if config.tensorboard:
            trackers.append(TensorBoardTracker(directory, step))
    except BaseException:
        for tracker in trackers:
            tracker.close()
        raise
    return trackers


@dataclass
class WandbRun:
    """The counterparts of a run directory at W&B, one for every segment of its curve.

    W&B drops steps that are not above the last one, so each time a run goes back to an earlier step
    a new segment begins (its ``fork_from`` would keep the steps before, but is a preview that not
    every server has). All are in one group.
    """

    started: float | None
    """Time, in seconds since 1970, when the directory's run began at its first step; None for a run
    of an earlier version, whose counterpart is named by its path alone."""
    segment: int = 1
    begins_after: int | None = None
    """Step that the segment follows; None for the first one."""

    @classmethod
    def continued(cls, directory: RunDirectory, step: int, *, repeats: bool) -> WandbRun:
        """Return the one that a start from ``step`` logs to, and note it in the directory."""
        try:
            found = cls(**json.loads(directory.wandb_file.read_bytes()))
        except (OSError, ValueError, TypeError):
            found = None
        if found is None or step == 0:
            found = cls(time.time() if step == 0 else None)
        elif repeats:
            return found.next(directory, step)
        found._save(directory)
        return found

    def next(self, directory: RunDirectory, step: int) -> WandbRun:
        """Return the segment that continues from ``step``, and note it in the directory."""
        found = WandbRun(self.started, self.segment + 1, step)
        found._save(directory)
        return found

    def _save(self, directory: RunDirectory) -> None:
        write_json(directory.wandb_file, dataclasses.asdict(self))

    def name(self, directory: RunDirectory) -> str:
        """Return the name that is shown."""
        later = "" if self.begins_after is None else f" from step {self.begins_after}"
        return f"{directory.name}{later}"

    def group(self, directory: RunDirectory) -> str:
        """Return what all segments have in common: other names, paths and starts have another.

        W&B takes at most 64 characters in an id, and few beside letters and digits.
        """
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", directory.name)[:40]
        path = str(directory.path.resolve())
        text = path if self.started is None else json.dumps([path, self.started])
        return f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def id(self, directory: RunDirectory) -> str:
        """Return the id of the segment."""
        later = f"-{self.segment}" if self.segment > 1 else ""
        return f"{self.group(directory)}{later}"


class WandbTracker:
    """A run of Weights & Biases with the name of the run directory, and one more per rollback."""

    def __init__(self, config: LoggingConfig, directory: RunDirectory, step: int, *, repeats: bool):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"logging.wandb is '{config.wandb}', but wandb is not installed: pip install wandb"
            ) from None
        self._wandb, self._config, self._directory = wandb, config, directory
        self._state = WandbRun.continued(directory, step, repeats=repeats)
        self._open()

    def _open(self) -> None:
        """Begin or continue the segment."""
        mode: Any = self._config.wandb
        self._run = self._wandb.init(
            project=self._config.wandb_project,
            name=self._state.name(self._directory),
            group=self._state.group(self._directory),
            dir=str(self._directory),
            mode=mode,
            id=self._state.id(self._directory),
            resume="allow",
            # Its own copies of changes and command go to a server, with all that is in them.
            settings={"disable_git": True, "x_disable_meta": not self._config.command_and_diff},
        )

    def record(self, values: dict[str, Any]) -> None:
        """Log the line at its step, or at the last one where that is later, as after a resume."""
        self._run.log(values, step=max(values["step"], self._run.step))

    def rewind(self, step: int) -> None:
        """Finish the segment, which keeps the later steps, and begin another one after ``step``."""
        self._run.summary["rolled_back_to_step"] = step
        self._run.finish()
        self._state = self._state.next(self._directory, step)
        self._open()

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class TensorBoardTracker:
    """Event files in the run directory, a scalar for each number of a line."""

    def __init__(self, directory: RunDirectory, step: int):
        self._directory = directory
        self._open(step)

    def _open(self, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "logging.tensorboard is true, but tensorboard is not installed: "
                "pip install tensorboard"
            ) from None
        # TensorBoard drops these steps of an earlier file.
        self._writer: Any = SummaryWriter(str(self._directory.tensorboard), purge_step=step + 1)

    def record(self, values: dict[str, Any]) -> None:
        """Add a scalar for each number of the line."""
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, values["step"])
        self._writer.flush()

    def rewind(self, step: int) -> None:
        """Open another event file, which hides the later steps of the earlier ones."""
        self._writer.close()
        self._open(step)

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
