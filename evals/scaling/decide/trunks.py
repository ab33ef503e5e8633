"""Runs of several lengths as branches of each other: what of a run is new, and its price."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from evals.scaling.decide.runs import Cell, Run

Key = tuple[str, Cell, int]


@dataclass(frozen=True)
class Trunks:
    """Where the learning rate of runs begins to decay, in tokens, by arm and cell.

    Before that two lengths of one arm, size and seed are the same run: the second one goes on from
    a checkpoint of the first. Where nothing is known of a cell, its runs share nothing.
    """

    decays: dict[tuple[str, Cell], float] = field(default_factory=dict)

    def beginning(self, run: Run, done: Sequence[Run]) -> tuple[Run | None, float]:
        """Return the run that another one begins from, and after how many tokens.

        None and 0 where it begins anew. ``done`` are in the order in which they were made; of
        several that share as much, it is the earliest. A run without a value is no trunk.
        """
        stable = self.decays.get((run.arm, run.cell))
        if stable is None:
            return None, 0.0
        found: tuple[Run | None, float] = None, 0.0
        for i, other in enumerate(done):
            if (other.arm, other.parameters, other.seed) != (run.arm, run.parameters, run.seed):
                continue
            start = self.beginning(other, done[:i])[1]
            shared = min(stable, self.decays.get((other.arm, other.cell), 0.0))
            # A branch holds no checkpoints of what its own trunk has trained.
            if math.isfinite(other.value) and shared > max(start, found[1]):
                found = other, shared
        return found

    def priced(self, run: Run, done: Sequence[Run]) -> Run:
        """Return a run with the cost of what is new in it; its cost is that of all of it."""
        return replace(run, cost=run.cost * (1 - self.beginning(run, done)[1] / run.tokens))


def key_of(run: Run) -> Key:
    """Return what tells runs apart."""
    return run.arm, run.cell, run.seed
