"""``launch decide targets``: train the arms at the target, and check the verdict with them."""

from __future__ import annotations

import json
import math
from itertools import combinations
from statistics import fmean
from typing import Any

from evals.scaling.decide import Step
from evals.scaling.decide.record import TARGETS, VERDICT, read_log, runs_of_row
from launch.decisions.plan import Plan
from launch.decisions.running import Show, make, value_of
from launch.grid import Member
from launch.members import DONE, FAILED
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.common.files import write_json


def check_by_targets(plan: Plan, options: Any, show: Show) -> int:
    """Train every arm at the target, and compare with what was said; raises UserError before."""
    rows = read_log(plan.directory, plan.digest)
    if not rows or rows[-1]["taken"] is not None:
        raise UserError(
            f"{plan.directory} has no verdict that target runs could check, expected a decision "
            "that has ended: run the command without 'targets' first"
        )
    try:
        said = json.loads((plan.directory / VERDICT).read_bytes())["said"]
    except (OSError, ValueError, KeyError):
        raise UserError(
            f"{plan.directory / VERDICT} is missing or damaged, expected the verdict: run the "
            "command without 'targets' again, which writes it"
        ) from None
    members = target_members(plan, options.seeds)
    states = make(plan, list(members.values()), options, show)
    values: dict[str, list[float]] = {}
    for (arm, _), member in members.items():
        if states is None or states[member.name].state not in (DONE, FAILED):
            show("the target runs have not ended; the same command goes on")
            return EXIT_STOPPED
        state = states[member.name].state
        value = value_of(member.config.run_directory, plan, state)
        if math.isfinite(value):
            values.setdefault(arm, []).append(value)
        else:
            show(f"{member.name} has no value: it failed or diverged")
    done = runs_of_row(rows[-1], plan.runs, plan.trunks)
    content = compare(plan, plan.campaign().step(done, plan.left(done)), values)
    lines = words(content)
    found = {"plan": plan.digest, "verdict": said, "said": lines, **content}
    write_json(plan.directory / TARGETS, found)
    for line in lines:
        show(line)
    show(f"written to {plan.directory / TARGETS}")
    return 0


def target_members(plan: Plan, seeds: int) -> dict[tuple[str, int], Member]:
    """Return the target runs, by arm and seed, the first seed of all arms first."""
    found = {}
    for seed in range(seeds):
        for arm in plan.targets:
            label = f"{arm}-target-seed{seed}"
            config = plan.target_config(arm, seed)
            config.name = f"{plan.name}-{label}"
            config.directory = str(plan.directory / label)
            found[arm, seed] = Member(label, {}, config)
    return found


def compare(plan: Plan, step: Step, values: dict[str, list[float]]) -> dict[str, Any]:
    """Return what the target runs gave, and how far it is from what was believed of each pair.

    A difference is given as in the verdicts: how many times the compute one arm is worth to the
    other, by the slope of the curve that was fitted before.
    """
    means = {arm: fmean(found) for arm, found in values.items()}
    pairs: list[dict[str, Any]] = []
    if step.posterior is not None:
        seen = step.posterior.observations
        target = next(iter(plan.targets.values()))
        slope = seen.slope((target.parameters, target.tokens))
        for a, b in combinations([arm for arm in means if arm in seen.arms], 2):
            low, middle, high = (step.posterior.quantile(a, b, q) for q in (0.025, 0.5, 0.975))
            found = math.exp((means[b] - means[a]) / slope)
            believed = [math.exp(u) for u in (low, middle, high)]
            pairs.append({"arms": [a, b], "believed": believed, "found": found})
    verdicts: list[dict[str, Any]] = []
    for v in step.verdicts:
        said: dict[str, Any] = {"kind": v.kind, "arms": list(v.pair), "probability": v.probability}
        if v.kind == "better" and set(v.pair) <= set(means):
            said["held"] = means[v.pair[0]] < means[v.pair[1]]
        verdicts.append(said)
    return {
        "values": values,
        "best": min(means, key=means.__getitem__) if means else None,
        "believed_best": step.posterior.best() if step.posterior is not None else {},
        "verdicts": verdicts,
        "pairs": pairs,
    }


def words(content: dict[str, Any]) -> list[str]:
    """Return what the target runs say, line by line."""
    values = content["values"]
    order = sorted(values, key=lambda arm: fmean(values[arm]))
    lines = []
    for arm in order:
        chance = content["believed_best"].get(arm)
        each = ", ".join(f"{value:.4f}" for value in values[arm])
        seeds = f", of {each}" if len(values[arm]) > 1 else ""
        was = "" if chance is None else f"; P(best) was {chance:.2f}"
        lines.append(f"{arm}: {fmean(values[arm]):.4f}{seeds}{was}")
    for verdict in content["verdicts"]:
        first, second = verdict["arms"]
        if "held" in verdict:
            what = "held" if verdict["held"] else "was wrong"
            lines.append(
                f"the verdict {what}: {first} better than {second}, P = "
                f"{verdict['probability']:.2f}"
            )
        elif verdict["kind"] == "better":
            lines.append(
                f"the verdict, {first} better than {second}, cannot be checked: one of them has no "
                "value at the target"
            )
        else:
            lines.append(f"the verdict was that {first} and {second} do not differ")
    if not content["verdicts"]:
        lines.append("the decision had said that it cannot be told")
    within = 0
    for pair in content["pairs"]:
        low, middle, high = pair["believed"]
        inside = low <= pair["found"] <= high
        within += inside
        lines.append(
            f"{pair['arms'][0]} over {pair['arms'][1]}: worth {pair['found']:.2f}x, believed "
            f"{middle:.2f}x [{low:.2f}, {high:.2f}]{'' if inside else ', outside'}"
        )
    if content["pairs"]:
        lines.append(
            f"{within} of {len(content['pairs'])} pairs lie in their 95 % intervals, which are of "
            "the arms' expected results: single runs also differ by their seeds"
        )
    return lines
