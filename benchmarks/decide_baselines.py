"""Simpler ways to decide between arms, which a replay is compared with."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.decide_suites import Suite
from evals.scaling.decide import Run, fit_common_curve, infer, observe
from evals.scaling.decide.runs import long_enough

RESAMPLES = 40
CONFIDENCE = 0.95


def one_size(suite: Suite) -> dict[str, Any]:
    """Rank by the largest size and length that all arms of a target can afford once."""
    right, spent = [], 0.0
    for arms in _groups(suite):
        cells = [{run.cell for run in suite.runs if run.arm == arm} for arm in arms]
        target = suite.targets[arms[0]]
        usual = [
            cell
            for cell in set.intersection(*cells)
            if 6 * cell[0] * cell[1] <= suite.rule.budget * target.compute
        ]
        if not usual:
            continue
        cell = max(usual, key=lambda c: (c[0] * c[1], c))
        spent += len(arms) * 6 * cell[0] * cell[1]
        values = {r.arm: r.value for r in reversed(suite.runs) if r.cell == cell}
        right += [
            (values[a] < values[b]) == (suite.truth[a] < suite.truth[b])
            for a, b in suite.pairs
            if a in arms and b in arms
        ]
    return {"cost": spent / _total(suite), "forced": fmean(right) if right else float("nan")}


def fixed_ladder(suite: Suite, seeds: int) -> dict[str, Any]:
    """Run every size that fits in the budget, smallest first, and ask the model once."""
    runs = [run for run in _ladder(suite, seeds) if suite.rule.smallest <= _share(suite, run)]
    posterior = infer(observe(runs, suite.targets), suite.prior)
    chances = {pair: posterior.better(*pair) for pair in suite.pairs}
    return _judged(suite, chances, runs)


def laws_per_arm(suite: Suite) -> dict[str, Any]:
    """Fit a law to each arm's own runs; its confidence is that of resampled residuals."""
    runs = _ladder(suite, 3)
    random = np.random.default_rng(0)
    predicted = {}
    for arm, target in suite.targets.items():
        own = [run for run in runs if run.arm == arm]
        cells, values = [run.cell for run in own], np.array([run.value for run in own])
        if len(set(cells)) < 2:
            return {"cost": 0.0, "forced": float("nan")}
        curve = fit_common_curve(cells, values.tolist())
        fitted = np.array([curve.value(*cell) for cell in cells])
        at = (target.parameters, target.tokens)
        draws = [curve.value(*at)]
        for _ in range(RESAMPLES):
            again = fitted + random.choice(values - fitted, len(values))
            draws.append(fit_common_curve(cells, again.tolist()).value(*at))
        predicted[arm] = draws
    chances = {}
    for a, b in suite.pairs:
        gap = np.array(predicted[b]) - np.array(predicted[a])
        share = (np.sum(gap[1:] > 0) + 0.5) / (RESAMPLES + 1)
        chances[a, b] = float(share)
        if (gap[0] > 0) != (share > 0.5):
            chances[a, b] = 0.5 + 1e-9 * float(np.sign(gap[0]))
    return _judged(suite, chances, runs)


def _judged(suite: Suite, chances: dict[tuple[str, str], float], runs: list[Run]) -> dict[str, Any]:
    right = {
        (a, b): (p > 0.5) == (suite.truth[a] < suite.truth[b]) for (a, b), p in chances.items()
    }
    said = [pair for pair, p in chances.items() if max(p, 1 - p) >= CONFIDENCE]
    return {
        "cost": sum(run.cost for run in runs) / _total(suite),
        "forced": fmean(right.values()),
        "pairs": len(chances),
        "said": len(said),
        "right": sum(right[pair] for pair in said),
    }


def _ladder(suite: Suite, seeds: int) -> list[Run]:
    """Return the runs of every size in the budget, with a number of seeds."""
    found: list[Run] = []
    spent, limit = 0.0, suite.rule.budget * _total(suite)
    by_share: dict[float, list[Run]] = defaultdict(list)
    for arm, target in suite.targets.items():
        own = [run for run in suite.runs if run.arm == arm and run.seed < seeds]
        one_size = len({run.parameters for run in own}) == 1
        least = suite.rule.tokens_per_parameter
        for run in long_enough(own, target, least, one_size=one_size):
            by_share[round(_share(suite, run), 9)].append(run)
    for _, runs in sorted(by_share.items()):
        priced: list[Run] = []
        for run in runs:
            cost = suite.price(run, [*found, *priced]) if suite.price else run.cost
            priced.append(replace(run, cost=cost))
        price = sum(run.cost for run in priced)
        if spent + price > limit:
            break
        spent += price
        found += priced
    return found


def _share(suite: Suite, run: Run) -> float:
    return run.compute / suite.targets[run.arm].compute


def _groups(suite: Suite) -> list[list[str]]:
    groups = defaultdict(list)
    for arm, target in suite.targets.items():
        groups[target].append(arm)
    return [arms for arms in groups.values() if len(arms) > 1]


def _total(suite: Suite) -> float:
    return sum(target.cost for target in suite.targets.values())
