"""Play a decision on finished runs: the rule asks, and a table answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from evals.scaling.decide.rule import Campaign, Step
from evals.scaling.decide.runs import Run

Price = Callable[[Run, Sequence[Run]], float]


@dataclass
class Outcome:
    """The end of a decision on a table, and the runs that were used for it."""

    step: Step
    runs: list[Run]


def play(campaign: Campaign, table: Sequence[Run], price: Price | None = None) -> Outcome:
    """Play a decision to its end; ``price`` is what a run costs after others."""
    for step, done in steps(campaign, table, price):
        last = Outcome(step, done)
    return last


def steps(
    campaign: Campaign, table: Sequence[Run], price: Price | None = None
) -> Iterator[tuple[Step, list[Run]]]:
    """Yield each step with the runs that it knows, until the decision ends."""
    done: list[Run] = []
    while True:
        possible = [run for run in table if run not in done]
        if price is not None:
            known = {(run.arm, run.cell, run.seed) for run in done}
            possible = [
                replace(run, cost=price(run, done))
                for run in table
                if (run.arm, run.cell, run.seed) not in known
            ]
        step = campaign.step(done, possible)
        yield step, list(done)
        if step.taken is None:
            return
        done += step.taken.runs


def branched(decay: float) -> Price:
    """Return prices of lengths that are decays from one trunk: what of it is new, and the decay."""

    def price(run: Run, done: Sequence[Run]) -> float:
        lengths = [r.tokens for r in done if r.arm == run.arm and r.parameters == run.parameters]
        trunk = max(lengths, default=0.0) * (1 - decay)
        return (
            6 * run.parameters * (run.tokens * decay + max(0.0, run.tokens * (1 - decay) - trunk))
        )

    return price
