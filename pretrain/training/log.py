"""Reports of a run: on the screen, in its log file, in its metrics, and to trackers."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pretrain.common.errors import flush_output, unwritable
from pretrain.common.files import LinesFile, explain_write_error, finite_or_null, is_refused_write
from pretrain.common.text import duration
from pretrain.config import LoggingConfig
from pretrain.run_directory import RunDirectory
from pretrain.run_time import add_start
from pretrain.training.trackers import Tracker, open_trackers


class _Console(Console):
    """A console that reports a reader that is gone, instead of ending the process."""

    def on_broken_pipe(self) -> None:
        """Raise the error."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


class RunLog:
    """The log of a run: the main process writes it, on every other one nothing happens.

    Lines that cannot be written are kept in memory until :meth:`write_held` has failed more than
    ``retries`` times in a row.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: LoggingConfig,
        *,
        active: bool,
        num_steps: int,
        step: int,
        retries: int = 0,
    ):
        self.directory, self.active, self.num_steps = directory, active, num_steps
        self._every, self._retries = config.every, retries
        self._refusals: int | None = None  # of writing the lines that are held, if any are
        self.seconds_before = 0.0  # those that earlier starts of the run logged
        self._progress: Progress | None = None
        self._trackers: list[Tracker] = []
        self._screen_lost = False
        if not active:
            return
        self.console = _Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        self.seconds_before = add_start(directory, step)
        repeats = self._keep_metrics_up_to(step)
        self._file = LinesFile(directory.metrics_file)
        self._blocks = LinesFile(directory.blocks_file) if config.blocks else None
        self._text = LinesFile(directory.log_file)
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
        self._keep_blocks_up_to(step)
        if not self.directory.metrics_file.exists():
            return False
        rows = self.directory.read_metrics()
        kept = [row for row in rows if row["step"] <= step]
        self.directory.write_metrics(kept)
        return len(kept) < len(rows)

    def _keep_blocks_up_to(self, step: int) -> None:
        rows = self.directory.read_blocks()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            self.directory.write_blocks(kept)

    def rewind(self, step: int) -> None:
        """Continue from an earlier step; the lines after it go to a separate file."""
        if not self.active:
            return
        self._file.flush()
        self._file.close()
        if self._blocks is not None:
            self._blocks.flush()
            self._blocks.close()
        dropped = [row for row in self.directory.read_metrics() if row["step"] > step]
        with contextlib.closing(LinesFile(self.directory.rolled_back_metrics_file)) as file:
            for row in dropped:
                file.write(json.dumps(finite_or_null(row), allow_nan=False))
        self._keep_metrics_up_to(step)
        self._file = LinesFile(self.directory.metrics_file)
        if self._blocks is not None:
            self._blocks = LinesFile(self.directory.blocks_file)
        for tracker in self._trackers:
            tracker.rewind(step)

    def say(self, message: str) -> None:
        """Print a line on the screen and into the log file."""
        if self.active:
            self._note(message)
            with self._screen():
                self.console.print(message)

    def record(self, values: dict[str, Any]) -> None:
        """Write one line of the metrics; numbers that are not finite become null."""
        if not self.active:
            return
        clean = finite_or_null(values)
        self._write(self._file, json.dumps(clean, allow_nan=False))
        for tracker in self._trackers:
            tracker.record(clean)

    def blocks(self, step: int, tokens: int, rows: Sequence[dict[str, Any]]) -> None:
        """Write the statistics of blocks, each named in its ``block``; trackers get the numbers."""
        if not self.active or self._blocks is None:
            return
        clean = finite_or_null({"step": step, "tokens": tokens, "blocks": list(rows)})
        self._write(self._blocks, json.dumps(clean, allow_nan=False))
        numbers = {
            f"blocks/{row['block']}/{name}": value
            for row in clean["blocks"]
            for name, value in row.items()
            if name != "block" and isinstance(value, int | float)
        }
        for tracker in self._trackers:
            tracker.record({"step": step, **numbers})

    def step(self, values: dict[str, Any], seconds_left: float) -> None:
        """Report a training step: in the metrics, and as the live line or a plain one."""
        self.record(values)
        if not self.active:
            return
        # The mean over the steps since the last line, where that is not the same one step.
        mean = f" (mean {values['loss_mean']:.4f})" if self._every > 1 else ""
        numbers = (
            f"loss {values['loss']:.4f}{mean}  lr {values['lr']:.2e}  "
            f"grad norm {values['grad_norm']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
        )
        if values["mfu"] is not None:
            numbers += f"  MFU {values['mfu']:.1%}"
            if values.get("hfu") is not None:
                numbers += f" ({values['hfu']:.1%} with recomputation)"
        numbers += f"  {duration(seconds_left)} left"
        line = f"step {values['step']}/{self.num_steps}  {numbers}"
        self._note(line)
        with self._screen():
            if self._progress is not None:
                self._progress.update(self._task, completed=values["step"], numbers=numbers)
            else:
                print(line, flush=True)

    def write_held(self) -> None:
        """Write the lines that are held in memory, if any are.

        Raises OSError, which names the file, where that failed more than ``retries`` times.
        """
        if self._refusals is None:
            return
        try:
            for file in filter(None, (self._file, self._blocks, self._text)):
                file.flush()
        except OSError:
            self._refusals += 1
            if self._refusals > self._retries:
                raise
        else:
            self._refusals = None
            self.say("the lines of the log and of the metrics that were held are written")

    def _note(self, line: str) -> None:
        self._write(self._text, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")

    def _write(self, file: LinesFile, line: str) -> None:
        """Write a line, or hold it where the machine refuses to write it now."""
        try:
            file.write(line)
        except OSError as error:
            if not self._retries or not is_refused_write(error):
                raise
            if self._refusals is None:
                self._refusals = 0
                words = f"warning: {explain_write_error(error)}; its lines are held in memory"
                with self._screen():
                    self.console.print(f"{words}, to be written with the next save")

    def close(self) -> None:
        """Release the screen and finish the files."""
        if not self.active:
            return
        try:
            if self._refusals is not None:
                for file in filter(None, (self._file, self._blocks, self._text)):
                    file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                lost = f"error: {explain_write_error(error)}; its last lines are lost"
                print(lost, file=sys.stderr, flush=True)
        with self._screen():
            if self._progress is not None:
                self._progress.stop()
                self._progress = None
        if self._screen_lost:
            flush_output()
        self._file.close()
        if self._blocks is not None:
            self._blocks.close()
        self._text.close()
        for tracker in self._trackers:
            tracker.close()

    @contextlib.contextmanager
    def _screen(self) -> Iterator[None]:
        """Write to the screen, or go on without it: its terminal, or its reader, may be gone."""
        try:
            yield
        except OSError as error:
            if self._screen_lost:
                return
            self._screen_lost = True
            words = f"{unwritable(error)}; training goes on, its log is {self.directory.log_file}"
            self._note(words)
            with contextlib.suppress(OSError):
                print(words, file=sys.stderr, flush=True)
