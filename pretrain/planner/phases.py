"""Plan the phases of a run, each with its own step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from rich.table import Table

from pretrain.common.screen import readable, titled_table
from pretrain.config.plan import Phase
from pretrain.planner.estimate import Planner
from pretrain.planner.figures import Estimate


class PlannedPhase(NamedTuple):
    """A phase, a step of it, and the learning rates of its first and last step."""

    phase: Phase
    estimate: Estimate
    rates: tuple[float, float]

    def seconds_from(self, step: int) -> float:
        """Return the seconds of its steps from ``step`` on."""
        return max(self.phase.last - max(self.phase.first, step), 0) * self.estimate.step_seconds


def planned_phases(planner: Planner, estimate: Estimate) -> list[PlannedPhase]:
    """Return every phase of a planned run, none for a run without; ``estimate`` is of its settings.

    Phases have their own micro-batches, and else the layout of ``estimate``.
    """
    if not planner.config.phases:
        return []
    plan, found, steps = planner.config.plan, [], dict[tuple[int, int, int], Estimate]()
    for phase in plan.phases:
        train, rows = phase.config.train, phase.config.parallel.micro_batch_size
        key = (train.seq_len, train.global_batch_tokens, rows)
        if key not in steps:
            own = Planner(phase.config, planner.vocab_size, planner.hardware, planner.software)
            parallel = replace(estimate.parallel, micro_batch_size=rows)
            steps[key] = own.estimate(parallel, estimate.devices)
        rates = (plan.learning_rate(phase.first), plan.learning_rate(phase.last - 1))
        found.append(PlannedPhase(phase, steps[key], rates))
    return found


def phases_table(phases: list[PlannedPhase]) -> Table:
    """Return the table of the phases."""
    table = titled_table(
        "phases",
        *("phase", "steps", "tokens", "seq_len", "batch", "learning rate"),
        *("GB", "tokens/s", "hours"),
    )
    for phase, estimate, (first, last) in phases:
        train = phase.config.train
        rate = f"{first:.3g}" if first == last else f"{first:.3g} to {last:.3g}"
        table.add_row(
            phase.name,
            f"{phase.steps:,}",
            f"{phase.tokens:,}",
            f"{train.seq_len:,}",
            f"{train.global_batch_tokens:,}",
            rate,
            f"{estimate.peak_memory / 1e9:,.1f}",
            f"{estimate.tokens_per_second:,.0f}",
            readable(phase.steps * estimate.step_seconds / 3600),
        )
    return table


def phase_figures(phases: list[PlannedPhase]) -> list[dict[str, Any]]:
    """Return what is printed of the phases, as numbers."""
    return [
        {
            "name": phase.name,
            "steps": phase.steps,
            "tokens": phase.tokens,
            "seq_len": phase.config.train.seq_len,
            "global_batch_tokens": phase.config.train.global_batch_tokens,
            "learning_rates": rates,
            "peak_memory": estimate.peak_memory,
            "tokens_per_second": estimate.tokens_per_second,
            "seconds": phase.steps * estimate.step_seconds,
        }
        for phase, estimate, rates in phases
    ]
