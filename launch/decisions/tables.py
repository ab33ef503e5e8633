"""Play a decision on a table of finished runs."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from evals.scaling.decide import PRIORS, Campaign, Rule, Run, Target
from evals.scaling.decide.replay import steps
from launch.decisions.words import COUNTED, step_words, verdict_words
from pretrain.common.config_loader import nearest
from pretrain.common.errors import UserError


def replay(options: argparse.Namespace, show: Callable[[str], None]) -> int:
    """Play the rule on a table, and print each step, the verdict and what the target runs were."""
    target = parse_target(options.target)
    runs = read_table(Path(options.replay), options.metric)
    arms = sorted({run.arm for run in runs})
    if options.arms:
        chosen = [arm.strip() for arm in options.arms.split(";")]
        for arm in chosen:
            if arm not in arms:
                raise UserError(
                    f"--arms has '{arm}'{nearest(arm, arms)}, expected arms of {options.replay}"
                )
        arms = list(dict.fromkeys(chosen))
    if len(arms) < 2:
        raise UserError(f"{options.replay} has {len(arms)} arms to decide between, expected two")
    at = (target.parameters, target.tokens)
    table = [
        run
        for run in runs
        if run.arm in arms and run.compute < target.compute and run.parameters <= at[0]
    ]
    if not table:
        raise UserError(
            f"{options.replay} has no run below the target {options.target}: it is below the "
            "largest run, or names no size of the table"
        )
    targets = {arm: replace(target, cost=_price(arm, target, runs)) for arm in arms}
    prior = PRIORS[options.prior]
    campaign = Campaign(
        targets,
        prior.for_data() if options.data_arms else prior,
        Rule(confidence=options.confidence, budget=options.budget, span=options.span),
        nats=options.prior == "loss",
    )
    total = sum(one.cost for one in targets.values())
    for number, played in enumerate(steps(campaign, table)):
        step, done = played
        show(step_words(number, step, total))
    slope = step.posterior.observations.slope(at) if step.posterior is not None else None
    by_size = all(run.cost == run.compute for run in table)
    counted = COUNTED["6nd"] if by_size else "the FLOPs of the table"
    show(verdict_words(step, campaign.targets, options.confidence, done, slope, counted))
    truth = {
        arm: fmean([r.value for r in runs if r.arm == arm and r.cell == at])
        for arm in arms
        if any(r.arm == arm and r.cell == at for r in runs)
    }
    if truth:
        listed = ", ".join(f"{a} {v:.4f}" for a, v in sorted(truth.items(), key=lambda x: x[1]))
        show(f"the table's runs at the target: {listed}")
    return 0


def _price(arm: str, target: Target, runs: Sequence[Run]) -> float:
    """Return the cost of an arm's target, counted as that of its runs is.

    Where the table has no run there, it is extrapolated with 6ND from the largest one of the arm.
    """
    own = [run for run in runs if run.arm == arm]
    there = [run.cost for run in own if run.cell == (target.parameters, target.tokens)]
    if there:
        return fmean(there)
    largest = max(own, key=lambda run: run.compute)
    return target.compute * largest.cost / largest.compute


def parse_target(text: str | None) -> Target:
    """Read ``PARAMETERS:TOKENS``."""
    try:
        parameters, tokens = (float(part) for part in (text or "").split(":"))
    except ValueError:
        parameters = tokens = -1.0
    if not (0 < parameters < math.inf and 0 < tokens < math.inf):
        raise UserError(f"--target is {text!r}, expected PARAMETERS:TOKENS, such as 1e9:1e11")
    return Target(parameters, tokens)


def read_table(path: Path, metric: str) -> list[Run]:
    """Read arm, parameters, tokens, seed, a metric and flops, the last three optional."""
    if not path.is_file():
        raise UserError(f"no table at {path}, expected a CSV file with arm, parameters, tokens")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise UserError(f"{path} has no rows, expected a run in each")
    for column in ("arm", "parameters", "tokens", metric):
        if column not in rows[0]:
            listed = ", ".join(rows[0])
            raise UserError(f"{path} has no column {column}, expected it beside {listed}")
    counted = [bool((row.get("flops") or "").strip()) for row in rows]
    if any(counted) and not all(counted):
        raise UserError(
            f"{path}, row {counted.index(False) + 2} has no flops where others have: FLOPs counted "
            "differently are not compared; expected all or none"
        )
    found = []
    for number, row in enumerate(rows, 2):
        try:
            seed, cost = int(row.get("seed") or 0), float(row.get("flops") or 0)
            size, tokens = float(row["parameters"]), float(row["tokens"])
            value = float(row[metric] or "nan")
        except ValueError as error:
            raise UserError(f"{path}, row {number}: {error}, expected numbers") from None
        if not (size > 0 and tokens > 0 and cost >= 0):
            raise UserError(f"{path}, row {number}: expected parameters and tokens above 0")
        found.append(Run(row["arm"], size, tokens, seed, value, cost))
    return found
