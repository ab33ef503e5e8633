"""Judge a claim by its criteria, which were written down before its runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evals.synthetic.claims.schema import Claim, Criterion
from pretrain.common.errors import UserError

SCORES = ("accuracy", "rows", "last", "loss", "tail_loss", "end_loss")
Measures = Mapping[str, float]


@dataclass(frozen=True)
class Verdict:
    """A criterion, the value that each seed has, and whether it holds."""

    criterion: Criterion
    values: list[float]
    needed: int
    held: bool


def measures_of(result: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run by the names that criteria use."""
    found = {"final loss": result["final_loss"]}
    if "window" in result:
        found["window"] = result["window"]
    length = result["settings"]["length"]
    for score in result["tests"]:
        passes = f", {score['passes']} passes" if "passes" in score else ""
        factor = f"{score['length'] // length}x"
        for name in SCORES:
            if score.get(name) is not None:  # results kept from before have not all of them
                found[f"{name} {factor}{passes}"] = score[name]
    return found


def judge(claim: Claim, found: Mapping[str, Mapping[int, Measures]]) -> list[Verdict]:
    """Return a verdict for each criterion; ``found`` are measures by arm and seed."""
    return [_verdict(criterion, claim, found) for criterion in claim.holds]


def _verdict(
    criterion: Criterion, claim: Claim, found: Mapping[str, Mapping[int, Measures]]
) -> Verdict:
    values = []
    for seed in claim.seeds:
        value = _measure(found[criterion.arm][seed], criterion.measure)
        if criterion.minus_arm is not None or criterion.minus_measure is not None:
            other = found[criterion.minus_arm or criterion.arm][seed]
            value -= _measure(other, criterion.minus_measure or criterion.measure)
        values.append(value)
    holding = sum(_holds(criterion, value) for value in values)
    needed = criterion.seeds or len(values)
    return Verdict(criterion, values, needed, holding >= needed)


def _measure(measures: Measures, name: str) -> float:
    if name not in measures:
        raise UserError(f"there is no measure '{name}', expected one of: {', '.join(measures)}")
    return measures[name]


def _holds(criterion: Criterion, value: float) -> bool:
    if criterion.at_least is not None:
        return value >= criterion.at_least
    assert criterion.at_most is not None
    return value <= criterion.at_most


def sentence(criterion: Criterion) -> str:
    """Return a criterion in words."""
    what = f"{criterion.arm}: {criterion.measure}"
    if criterion.minus_arm is not None or criterion.minus_measure is not None:
        arm, measure = criterion.minus_arm, criterion.minus_measure
        what += f" minus {f'{arm}: ' if arm else ''}{measure or criterion.measure}"
    if criterion.at_least is not None:
        return f"{what} is at least {criterion.at_least:g}"
    return f"{what} is at most {criterion.at_most:g}"
