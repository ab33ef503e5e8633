"""Reports of a run: on the screen, in its log file, in its metrics, and to trackers."""

from __future__ import annotations

import json
import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pretrain.common.text import duration
from pretrain.config import LoggingConfig
from pretrain.run_directory import RunDirectory
from pretrain.training.trackers import Tracker, open_trackers


class RunLog:
    """The log of a run: the main process writes it, on every other one nothing happens."""

    def __init__(
        self,
        directory: RunDirectory,
        config: LoggingConfig,
        *,
        active: bool,
        num_steps: int,
        step: int,
    ):
        self.directory, self.active, self.num_steps = directory, active, num_steps
        self._progress: Progress | None = None
        self._trackers: list[Tracker] = []
        if not active:
            return
        self.console = Console(highlight=False, soft_wrap=True)
        repeats = self._keep_metrics_up_to(step)
        self._file = directory.metrics_file.open("a")
        self._text = directory.log_file.open("a")
        try:
            self._trackers = open_trackers(config, directory, step, repeats=repeats)
        except BaseException:
            self.close()
            raise
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
                transient=True,
            )
            self._task: TaskID = self._progress.add_task("", total=num_steps, numbers="starting")
            self._progress.update(self._task, completed=step)
            self._progress.start()

    def _keep_metrics_up_to(self, step: int) -> bool:
        """Drop the lines of steps that will be repeated, and a last line cut short.

        Returns whether there were any to repeat.
        """
        if not self.directory.metrics_file.exists():
            return False
        rows = self.directory.read_metrics()
        kept = [row for row in rows if row["step"] <= step]
        self.directory.write_metrics(kept)
        return len(kept) < len(rows)

    def rewind(self, step: int) -> None:
        """Continue from an earlier step; the lines after it go to a separate file."""
        if not self.active:
            return
        self._file.close()
        dropped = [row for row in self.directory.read_metrics() if row["step"] > step]
        with self.directory.rolled_back_metrics_file.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in dropped)
        self._keep_metrics_up_to(step)
        self._file = self.directory.metrics_file.open("a")
        for tracker in self._trackers:
            tracker.rewind(step)

    def say(self, message: str) -> None:
        """Print a line on the screen and into the log file."""
        if self.active:
            self.console.print(message, markup=False)
            self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
            self._text.flush()

    def record(self, values: dict[str, Any]) -> None:
        """Write one line of the metrics; numbers that are not finite become null."""
        if not self.active:
            return
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.record(clean)

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """Report a training step: in the metrics, and as the live line or a plain one."""
        self.record(values)
        if not self.active:
            return
        numbers = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        )
        if values["mfu"] is not None:
            numbers += f"  MFU {values['mfu']:.1%}"
            if values.get("hfu") is not None:
                numbers += f" ({values['hfu']:.1%} with recomputation)"
        numbers += f"  {duration(seconds_left)} left"
        if self._progress is not None:
            self._progress.update(self._task, completed=values["step"], numbers=numbers)
        line = f"step {values['step']}/{self.num_steps}  {numbers}"
        if self._progress is None:
            print(line, flush=True)
        self._text.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")

    def close(self) -> None:
        """Release the screen and finish the files."""
        if not self.active:
            return
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._file.close()
        self._text.close()
        for tracker in self._trackers:
            tracker.close()
