"""A trace of some steps: where their time and their memory go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.common.files import write_figure
from pretrain.training.callbacks.base import Callback
from pretrain.training.result import TrainResult

_HISTORY = 1_000_000  # allocations of a GPU's snapshot


class Profiler(Callback):
    """Trace the steps ``first`` to ``last`` with torch.profiler into the run directory.

    Every process writes ``profiles/steps-FIRST-LAST-rank-N.json``, which chrome://tracing and
    https://ui.perfetto.dev show. With ``memory`` also ``...-memory.png``, what is allocated over
    time, and on a GPU ``...-memory.pickle``, a snapshot with the stack of every allocation, which
    https://docs.pytorch.org/memory_viz shows.
    """

    def __init__(self, first: int = 10, last: int = 12, *, memory: bool = False):
        self.first, self.last, self.memory = first, last, memory
        self._profile: torch.profiler.profile | None = None

    def before_step(self) -> None:
        """Start the trace before its first step."""
        if self.trainer.state.step + 1 == self.first and self._profile is None:
            if self.memory and torch.cuda.is_available():
                torch.cuda.memory._record_memory_history(max_entries=_HISTORY)
            self._profile = torch.profiler.profile(profile_memory=self.memory)
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
            self._stop()

    def _stop(self) -> torch.profiler.profile:
        assert self._profile is not None
        profile, self._profile = self._profile, None
        profile.stop()
        return profile

    def _write(self) -> None:
        if self._profile is None:
            return
        profile = self._stop()
        folder = self.trainer.run_directory.profiles
        folder.mkdir(exist_ok=True)
        name = f"steps-{self.first}-{self.last}-rank-{dist.get_rank()}"
        writing = folder / f".{name}.json.tmp"
        profile.export_chrome_trace(str(writing))
        writing.rename(folder / f"{name}.json")
        if not self.memory:
            return
        draw_memory(folder / f"{name}.json", folder / f"{name}-memory.png")
        if torch.cuda.is_available():
            torch.cuda.memory._dump_snapshot(str(folder / f"{name}-memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)


def memory_over_time(trace: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Return, for each device of a trace, seconds from its start and the MB allocated then."""
    with trace.open() as file:
        events = json.load(file)["traceEvents"]
    found: dict[str, list[tuple[float, float]]] = {}
    for event in events:
        if event.get("name") == "[memory]":
            about: dict[str, Any] = event["args"]
            number = about.get("Device Id", -1)
            device = "CPU" if about["Device Type"] == 0 else f"GPU {number}"
            found.setdefault(device, []).append((event["ts"], about["Total Allocated"]))
    start = min((points[0][0] for points in map(sorted, found.values())), default=0.0)
    return {
        device: ([(t - start) / 1e6 for t, _ in points], [size / 1e6 for _, size in points])
        for device, points in ((d, sorted(p)) for d, p in sorted(found.items()))
    }


def draw_memory(trace: Path, picture: Path) -> None:
    """Draw what was allocated over the time of a trace, one curve for each device."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.5), layout="constrained")
    axes = figure.subplots()
    for device, (seconds, sizes) in memory_over_time(trace).items():
        peak = max(sizes)
        axes.step(seconds, sizes, where="post", lw=1, label=f"{device}, at most {peak:,.0f} MB")
    axes.set_xlabel("seconds")
    axes.set_ylabel("MB allocated")
    axes.set_title(f"memory of {trace.stem}", fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)
    write_figure(picture, figure, dpi=120)
