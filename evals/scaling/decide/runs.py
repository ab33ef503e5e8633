"""Runs of arms, and the target at which the arms are compared."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

Cell = tuple[float, float]


@dataclass(frozen=True, order=True)
class Run:
    """A finished run, or one that could be made.

    ``value`` is the metric, lower is better; ``cost`` its FLOPs as they are counted for the budget,
    by default 6 x parameters x tokens.
    """

    arm: str
    parameters: float
    tokens: float
    seed: int = 0
    value: float = float("nan")
    cost: float = 0.0

    def __post_init__(self) -> None:
        """Fill in the cost."""
        if not self.cost:
            object.__setattr__(self, "cost", 6 * self.parameters * self.tokens)

    @property
    def cell(self) -> Cell:
        """Return the size and length, which arms share."""
        return self.parameters, self.tokens

    @property
    def compute(self) -> float:
        """6 x parameters x tokens, whatever the cost is."""
        return 6 * self.parameters * self.tokens


@dataclass(frozen=True)
class Target:
    """The size and length at which arms are compared."""

    parameters: float
    tokens: float
    cost: float = 0.0

    def __post_init__(self) -> None:
        """Fill in the cost."""
        if not self.cost:
            object.__setattr__(self, "cost", self.compute)

    @property
    def compute(self) -> float:
        """6 x parameters x tokens, whatever the cost is."""
        return 6 * self.parameters * self.tokens


def long_enough(runs: Iterable[Run], target: Target, least: float, *, one_size: bool) -> list[Run]:
    """Leave out runs with few tokens per parameter, under ``least`` of the target's.

    Differences move fast there. Where the ladder has one size, its lengths are the ladder and none
    is left out.
    """
    if one_size:
        return list(runs)
    ratio = least * target.tokens / target.parameters
    return [run for run in runs if run.tokens / run.parameters >= ratio * (1 - 1e-9)]
