"""A trace of some steps: where their time goes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from pretrain.training.callbacks.base import Callback
from pretrain.training.result import TrainResult


class Profiler(Callback):
    """Trace the steps ``first`` to ``last`` with torch.profiler into the run directory.

    Every process writes ``profiles/steps-FIRST-LAST-rank-N.json``, which chrome://tracing and
    https://ui.perfetto.dev show.
    """

    def __init__(self, first: int = 10, last: int = 12):
        self.first, self.last = first, last
        self._profile: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Start the trace before its first step."""
        if self.trainer.state.step + 1 == self.first and self._profile is None:
            self._profile = torch.profiler.profile()
            self._profile.start()

    def between_steps(self) -> None:
        """Write the trace after its last step."""
        if self.trainer.state.step >= self.last or self.trainer.stopping:
            self._write()

    def on_fit_end(self, result: TrainResult) -> None:
        """Write a trace that the end of the run cut short."""
        self._write()

    def on_exception(self, error: BaseException) -> None:
        """Stop a trace that an exception cut short, without writing it."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self) -> None:
        if self._profile is None:
            return
        self._profile.stop()
        folder = self.trainer.run_directory.profiles
        folder.mkdir(exist_ok=True)
        name = f"steps-{self.first}-{self.last}-rank-{dist.get_rank()}.json"
        writing = folder / f".{name}.tmp"
        self._profile.export_chrome_trace(str(writing))
        writing.rename(folder / name)
        self._profile = None
