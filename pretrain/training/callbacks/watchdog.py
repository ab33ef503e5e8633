"""The watchdog over a run's processes."""

from __future__ import annotations

from pretrain.training.callbacks.base import Callback
from pretrain.training.result import TrainResult
from pretrain.training.watchdog import Watchdog


class WatchProcesses(Callback):
    """End all processes, soon and with one message, when one of several fails, hangs or dies."""

    _watchdog: Watchdog | None = None

    def on_fit_start(self) -> None:
        """Start watching."""
        seconds = 60 * self.trainer.config.parallel.timeout_minutes
        self._watchdog = Watchdog(seconds, self.trainer.run_directory)
        self._watchdog.__enter__()

    def on_work(self, work: str) -> None:
        """Pass on what this process does."""
        if self._watchdog is not None:
            self._watchdog.at(work)

    def on_progress(self) -> None:
        """Pass on that the work advances."""
        if self._watchdog is not None:
            self._watchdog.moving()

    def on_fit_end(self, result: TrainResult) -> None:
        """Stop watching."""
        if self._watchdog is not None:
            self._watchdog.__exit__(None, None, None)

    def on_exception(self, error: BaseException) -> None:
        """End all processes, with the error as the message."""
        if self._watchdog is not None:
            self._watchdog.__exit__(type(error), error, error.__traceback__)
