"""What a decision says: a line for each step, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evals.scaling.decide import Run, Step, Target, Verdict
from evals.scaling.decide.accidents import spread_grows
from pretrain.common.screen import readable

COUNTED = {
    "flops": "FLOPs with attention",
    "6nd": "6 x parameters x tokens",
    "hours": "planned device-hours",
}
_ENDS = {
    "budget": "no further run is within the budget",
    "all made": "every run that the decision may make was made",
    "futile": "no affordable run can be expected to change it",
    "unstable": "fewer than two arms are stable",
    "verdict": "",
}


def step_words(number: int, step: Step, total: float) -> str:
    """Return what is believed after the runs so far, and which are next, and why."""
    parts = [f"step {number}", f"cost {step.spent / total:.1%} of the targets"]
    if step.posterior is not None:
        chances = step.posterior.best()
        order = sorted(chances, key=lambda arm: -chances[arm])
        leader, second = order[:2]
        low, middle, high = (
            math.exp(step.posterior.quantile(leader, second, q)) for q in (0.025, 0.5, 0.975)
        )
        parts.append(
            f"{leader} worth {middle:.2f}x {second} [{low:.2f}, {high:.2f}], P(best) "
            f"{chances[leader]:.2f}"
        )
    if step.taken is not None:
        size, tokens = step.taken.cell
        arms = ", ".join(step.taken.arms)
        seeds = ",".join(sorted({str(run.seed) for run in step.taken.runs}))
        parts.append(f"next: {readable(size)} x {readable(tokens)} tokens, {arms}, seed {seeds}")
        parts.append(f"why: {_why(step)}")
    return "  ".join(parts)


def _why(step: Step) -> str:
    if step.reason == "first":
        return "every arm is run at the two smallest sizes first"
    taken = next(s for s in step.scored if s.candidate == step.taken)
    return (
        f"of {len(step.scored)} candidates it is expected to say most for its cost "
        f"({taken.gain:.3g} nats of the verdict)"
    )


def verdict_words(
    step: Step,
    targets: Mapping[str, Target],
    confidence: float,
    done: Sequence[Run],
    slope: float | None,
    counted: str,
) -> str:
    """Return the paragraph at the end: a verdict, or that it cannot be told and why.

    ``counted`` is what costs are, as they can change the verdict.
    """
    total = sum(target.cost for target in targets.values())
    share = f"{step.spent / total:.1%}"
    spent = f"Spent {share} of the {len(targets)} target runs, counted in {counted}."
    target = next(iter(targets.values()))
    at = f"{readable(target.parameters)} parameters and {readable(target.tokens)} tokens"
    notes = [
        f"The seeds of {arm} differ more at the largest size than at the smallest: this metric "
        "cannot decide it, expected another one."
        for arm in spread_grows(run for run in done if math.isfinite(run.value))
    ]
    notes += [
        f"{arm} is unstable: two of its runs diverged or failed; that does not say it is worse."
        for arm in step.unstable
    ]
    if step.verdicts:
        found = _said(step.verdicts[-1], at, confidence, slope)
        kept = (
            "Replays of this rule on public ladders kept .94 of such verdicts."
            if step.verdicts[-1].kind == "better"
            else ""
        )
        return " ".join(part for part in (found, spent, kept, *notes) if part)
    chances = step.posterior.best() if step.posterior is not None else {}
    listed = ", ".join(f"{arm} {p:.2f}" for arm, p in sorted(chances.items(), key=lambda x: -x[1]))
    within = "" if step.reason == "all made" else "within the budget "
    believed = f" P(best): {listed}." if listed else ""
    return " ".join(
        [
            f"It cannot be told {within}which is better at {at}: {_ENDS[step.reason]}.{believed}",
            spent,
            *notes,
        ]
    )


def _said(verdict: Verdict, at: str, confidence: float, slope: float | None) -> str:
    first, second = verdict.pair
    sure = f"P = {verdict.probability:.2f} (q {confidence:g})"
    if verdict.kind == "alike":
        return f"There is no difference that matters between {first} and {second} at {at}, {sure}."
    low, middle, high = (math.exp(u) for u in (verdict.low, verdict.middle, verdict.high))
    units = "" if slope is None else f", about {verdict.middle * slope:.3g} of the metric"
    return (
        f"{first} is better at {at}, {sure}, worth {middle:.2f}x the compute of {second} "
        f"[{low:.2f}, {high:.2f}]{units}."
    )
