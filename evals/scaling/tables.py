"""Print fits, sizes and comparisons."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from evals.scaling.comparing import Comparison
from evals.scaling.fitting import Fit
from evals.scaling.notes import grouped
from pretrain.common.screen import readable, show_table, titled_table


def sentences(found: Comparison) -> list[str]:
    """Return a comparison's results in sentences."""
    first, second = found.families
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
        if found.crossing_interval is not None:
            low, high = found.crossing_interval
            where += f" (95 % of the samples that cross: {low:.3g} to {high:.3g})"
        result.append(f"{where}; {found.crossing_share:.0%} of the samples cross at all")
    ahead = first if found.target_difference < 0 else second
    sure = found.target_interval[0] * found.target_interval[1] > 0
    result.append(
        f"at {found.target:.3g} FLOPs {ahead} is predicted to be ahead by "
        f"{abs(found.target_difference):.4f} nats, which is {'' if sure else 'not '}significant at "
        "95 %"
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
    table.add_row("tokens per parameter", readable(size.tokens / size.parameters), "")
    table.add_row("loss", f"{size.loss:.4f}", ends(size.loss_interval))
    table.add_row("parameters within 0.5 % of the loss", "", ends(size.alike))
    if size.schedule:
        table.add_row("schedule", size.schedule, "")
    show_table(table, console)


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
