"""What a decision could cost, and what could be told at all, before anything is run."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from rich.console import Console

from evals.scaling.decide import Run, infer, observe
from evals.scaling.decide.inference import variance_after
from launch.decisions.plan import Plan
from launch.matching import counts_of
from launch.planning import print_plans
from pretrain.common.screen import readable, show_table, titled_table


def show_prices(plan: Plan, console: Console, show: Callable[[str], None]) -> None:
    """Print the price of every size and of the target, and the least difference to be told."""
    settings = plan.settings
    total = sum(target.cost for target in plan.targets.values())
    table = titled_table(
        f"{plan.name}: one seed of each size; the budget counts {settings.cost}",
        *("arm", "size", "parameters", "tokens", "6ND", "true FLOPs", "share of the targets"),
    )
    for run in plan.runs:
        if run.seed:
            continue
        counts = counts_of(plan.members[run.arm, run.cell, 0].config)
        table.add_row(
            run.arm,
            f"{run.parameters / 1e6:.3g}M",
            f"{counts.parameters:,}",
            f"{run.tokens:,.0f}",
            readable(6 * counts.parameters * run.tokens),
            readable(counts.training_flops() * run.tokens),
            f"{run.cost / total:.3%}",
        )
    table.add_section()
    for arm, target in plan.targets.items():
        flops = plan.counted[arm]
        table.add_row(
            arm,
            "target",
            "",
            f"{target.tokens:,.0f}",
            readable(flops["6nd"]),
            readable(flops["flops"]),
            f"{target.cost / total:.1%}",
        )
    show_table(table, console)
    members = [m for (_, _, seed), m in plan.members.items() if seed == 0]
    print_plans(console, members, settings.hardware, 1)
    if plan.trunks.decays:
        show(
            "Each length is priced as a whole run here; after another one of its arm, size and "
            "seed it is a branch, and costs what is new in it."
        )
    elif len(settings.lengths) > 1:
        show(
            "Each length is a run of its own: only with schedule.kind: wsd, and without phases, "
            "do lengths share their beginning."
        )
    if settings.history:
        names = ("level", "slope", "wander", "noise")
        listed = ", ".join(f"{n} {m:.3g}" for n, m in zip(names, plan.prior.medians, strict=True))
        show(f"Expected after {', '.join(settings.history)}: {listed}.")
    runs = _affordable(plan, settings.budget * total)
    spent = sum(run.cost for run in runs)
    worth = math.exp(_least_difference(plan, runs))
    show(
        f"budget {settings.budget:.0%} of the targets; every size of it once costs "
        f"{spent / total:.1%}, after which an arm must be worth {worth:.2f}x the other's compute "
        f"to be told at {settings.confidence:g}, if differences are of the usual size. Nothing has "
        "been started."
    )


def _affordable(plan: Plan, budget: float) -> list[Run]:
    """Return one seed of every size and its longest length, as long as the budget lasts."""
    found: list[Run] = []
    longest = {run.parameters: run.cell for run in sorted(plan.runs)}
    for cell in sorted(longest.values()):
        runs = [run for run in plan.runs if run.cell == cell and run.seed == 0]
        if sum(run.cost for run in [*found, *runs]) > budget * (1 + 1e-9):
            break
        found += runs
    return found


def _least_difference(plan: Plan, runs: list[Run]) -> float:
    """Return the u of a difference that the runs would tell, by the prior's medians."""
    from scipy.special import ndtri

    first = min(run.cell for run in runs)
    level = [Run(r.arm, *r.cell, value=1.0 + 1e-3 * i) for i, r in enumerate(runs[:2])]
    start = [Run(run.arm, *first, value=run.value) for run in level]
    arms = [run.arm for run in level]
    posterior = infer(
        observe(start, {arm: plan.targets[arm] for arm in arms}), plan.campaign().prior
    )
    later = variance_after(posterior, [run for run in runs if run.arm in arms])
    variance = later[:, 0, 0] + later[:, 1, 1] - 2 * later[:, 0, 1]
    middle = float(np.median(np.sqrt(np.maximum(variance, 0.0))))
    return float(ndtri(plan.settings.confidence)) * middle
