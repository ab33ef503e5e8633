"""Mirrors of a run's metrics: Weights & Biases, TensorBoard."""

from __future__ import annotations

import hashlib
import re
from typing import Any, Protocol

from pretrain.common.errors import UserError
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


def open_trackers(config: LoggingConfig, directory: RunDirectory, step: int) -> list[Tracker]:
    """Return the trackers that ``logging`` asks for, which continue from ``step``.

    Raises UserError where the library of one is not installed.
    """
    trackers: list[Tracker] = []
    try:
        if config.wandb != "disabled":
            trackers.append(WandbTracker(config, directory))
        if config.tensorboard:
            trackers.append(TensorBoardTracker(directory, step))
    except BaseException:
        for tracker in trackers:
            tracker.close()
        raise
    return trackers


def wandb_id(directory: RunDirectory) -> str:
    """Return the id of the run's counterpart: another one for every path, the same on a resume.

    W&B takes at most 64 characters, and few beside letters and digits.
    """
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", directory.name)[:40]
    digest = hashlib.sha256(str(directory.path.resolve()).encode()).hexdigest()
    return f"{name}-{digest[:16]}"


class WandbTracker:
    """A run of Weights & Biases with the name of the run directory."""

    def __init__(self, config: LoggingConfig, directory: RunDirectory):
        try:
            import wandb
        except ImportError:
            raise UserError(
                f"logging.wandb is '{config.wandb}', but wandb is not installed: pip install wandb"
            ) from None
        mode: Any = config.wandb
        self._run = wandb.init(
            project=config.wandb_project,
            name=directory.name,
            dir=str(directory),
            mode=mode,
            id=wandb_id(directory),
            resume="allow",
            # Its own copies of changes and command go to a server, with all that is in them.
            settings={"disable_git": True, "x_disable_meta": not config.command_and_diff},
        )

    def record(self, values: dict[str, Any]) -> None:
        """Log the line at its step."""
        self._run.log(values, step=values["step"])

    def rewind(self, step: int) -> None:
        """Do nothing: its steps only rise, and lines of earlier ones are ignored there."""

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
