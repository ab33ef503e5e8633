"""Print fits, sizes and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from evals.scaling.choosing import LawChoice
from evals.scaling.comparing import Comparison
from evals.scaling.fitting import Fit
from evals.scaling.notes import grouped
from evals.scaling.planning import Choice
from pretrain.common.screen import readable, show_table, titled_table


def with_interval(value: float, ends: tuple[float, float] | None) -> str:
    """Return a loss, or a difference of losses, with half of its interval."""
    return f"{value:.4f}" + (f" ± {(ends[1] - ends[0]) / 2:.4f}" if ends is not None else "")


def sentences(found: Comparison) -> list[str]:
    """Return a comparison's results in sentences."""
    first, second = found.families
    if found.refused:
        return [found.refused]
    other = second if found.better == first else first
    low, high = found.difference_interval
    result = [
        f"{found.better} is ahead of {other} by {found.difference:.4f} nats at the largest budget "
        f"that both have (95 %: {low:.4f} to {high:.4f})"
    ]
    if found.crossing is None:
        result.append("their laws do not cross above the smallest budget that both have")
    else:
        where = f"their laws cross at {found.crossing:.3g} FLOPs"
        if found.crossing > found.largest:
            where += f", {found.crossing / found.largest:.3g} x the largest run"
        if found.crossing_interval is not None:
            low, high = found.crossing_interval
            where += f" (95 % of the samples that cross: {low:.3g} to {high:.3g})"
        result.append(f"{where}; {found.crossing_share:.0%} of the samples cross at all")
    ahead = first if found.target_difference < 0 else second
    sure = found.target_interval[0] * found.target_interval[1] > 0
    low, high = sorted(abs(x) if sure else x for x in found.target_interval)
    if not sure and found.target_difference < 0:
        low, high = -high, -low
    times = found.target / found.largest
    far = f", {times:.3g} x the largest run," if times > 1.001 else ""
    result.append(
        f"at {found.target:.3g} FLOPs{far} {ahead} is predicted to be ahead by "
        f"{abs(found.target_difference):.4f} nats (95 %: {low:.4f} to {high:.4f}), which is "
        f"{'' if sure else 'not '}significant at 95 %"
    )
    if found.cost is None:
        result.append("no pair of additional runs up to that budget would decide it")
    elif found.cost > 0:
        result.append(
            f"one more run of each family, {found.cost:.3g} FLOPs together, would decide it"
        )
    return result


def show_size(size: Any, console: Console) -> None:
    """Print a :class:`evals.scaling.planning.SizeChoice`."""

    def ends(interval: tuple[float, float] | None) -> str:
        return "" if interval is None else f"{readable(interval[0])} to {readable(interval[1])}"

    table = titled_table(f"{size.flops:.3g} FLOPs", "quantity", "best", "95 % interval")
    table.add_row("parameters", readable(size.parameters, 4), ends(size.parameters_interval))
    table.add_row("tokens", readable(size.tokens, 4), ends(size.tokens_interval))
    ratio = None
    if size.parameters_interval is not None and size.tokens_interval is not None:
        (least, most), (fewest, largest) = size.parameters_interval, size.tokens_interval
        ratio = (fewest / most, largest / least)
    table.add_row("tokens per parameter", readable(size.tokens / size.parameters), ends(ratio))
    table.add_row("loss", f"{size.loss:.4f}", ends(size.loss_interval))
    table.add_row("parameters within 0.5 % of the loss", "", ends(size.alike))
    if size.schedule:
        table.add_row("schedule", size.schedule, "")
    show_table(table, console)
    if size.extrapolates:
        console.print(f"extrapolates from the fitted runs: {size.extrapolates}", style="yellow")


def errors_sentence(label: str, means: dict[str, float], ends: dict[str, float]) -> str:
    """Return the curves' mean errors and errors at their ends, in percent, in one sentence."""
    each = ", ".join(f"{n} {means[n]:.3f} / {ends[n]:+.3f}" for n in means)
    end = float(np.mean(np.abs(list(ends.values()))))
    return (
        f"{label}: mean error {np.mean(list(means.values())):.4f} %, {end:.4f} % at the ends "
        f"(mean / end: {each})"
    )


def show_choice(choice: LawChoice, console: Console) -> None:
    """Print which law was chosen, why, and the held-out errors of each."""
    if choice.held_out:
        table = titled_table(
            "error on held-out curves (%): mean / end",
            "held out",
            *(r.law for r in choice.held_out),
        )
        for name in choice.held_out[0].errors:
            table.add_row(
                name, *(f"{r.errors[name]:.3f} / {r.ends[name]:+.3f}" for r in choice.held_out)
            )
        table.add_section()
        table.add_row(
            "mean", *(f"{r.mean:.4f} / {r.end:.4f}" for r in choice.held_out), style="bold"
        )
        show_table(table, console)
    console.print(f"law: {choice.law}: {choice.why}")


def show_schedules(choices: Sequence[Choice], steps: int, console: Console) -> None:
    """Print the best of the schedules, with intervals."""
    notes = {choice.extrapolates for choice in choices[:15]}
    several = ("note",) if len(notes) > 1 else ()
    table = titled_table(
        f"schedules of {steps:,} steps, best first",
        *("schedule", "final loss (95 %)", "behind the best", *several),
        left=several,
    )
    for choice in choices[:15]:
        apart = None if choice is choices[0] else choice.behind
        table.add_row(
            choice.name,
            with_interval(choice.loss, choice.interval),
            with_interval(choice.loss - choices[0].loss, apart),
            *((choice.extrapolates,) if several else ()),
        )
    show_table(table, console)
    if not several and (note := choices[0].extrapolates):
        console.print(f"all extrapolate from the fitted runs: {note}", style="yellow")
    if choices[0].interval is None:
        console.print("no intervals: the law was fitted with --bootstrap 0", style="yellow")
    else:
        alike = sum(c.behind is not None and c.behind[0] <= 0 for c in choices[1:])
        console.print(f"{alike} of {len(choices) - 1} others may be as good as the best (95 %)")


def show_fit(found: Fit, console: Console, name: str = "") -> None:
    """Print a fit's parameters, doubts and warnings, headed by ``name``."""
    title = f"{name + ': ' if name else ''}{found.law.title}: {found.law.formula}"
    columns = ("parameter", "value", "95 % interval", "unit")
    table = titled_table(title, *columns, left=("95 % interval", "unit"))
    for parameter in found.law.parameters:
        ends = found.intervals.get(parameter.name)
        table.add_row(
            parameter.name,
            readable(found.values[parameter.name], 5),
            f"{readable(ends[0], 4)} to {readable(ends[1], 4)}" if ends else "",
            parameter.unit,
        )
    for quantity, value in found.law.derived(found.values).items():
        table.add_row(quantity, readable(value, 5), "", "", style="dim")
    show_table(table, console)
    for parameter_name, why in found.undetermined.items():
        console.print(f"the data do not determine {parameter_name}: {why}", style="yellow")
    objectives = sorted(s.objective for s in found.starts)
    equal = sum(o <= 1.01 * objectives[0] for o in objectives)
    console.print(
        f"objective {1e6 * found.objective:.4f}e-6, reached from {equal} of {len(objectives)} "
        "starts"
    )
    for note in grouped(found.warnings):
        console.print(note, style="yellow")
