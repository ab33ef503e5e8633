"""The tables of a report: results, cost, scores, and the settings that differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from evals.report.figures import color_of
from evals.report.groups import Group, shared_settings
from evals.report.runs import Run
from evals.report.scores import score_names
from pretrain.common.screen import readable

_MOST_COLUMNS = 6  # of scores or of settings side by side: a screen shows them all
_BORDERS = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "double"}  # as lines are drawn
_LONG = 3600  # seconds from which on times are in hours
Measure = tuple[str, Callable[[Run], float | None], str]


def make_tables(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return the tables that have anything to show, each with a heading, columns and rows.

    A row belongs to a group, whose label and color begin it; a cell has a text and a value to
    sort by.
    """
    tables = [_results(groups), _table("Cost", groups, _costs(groups))]
    scores = score_names([s for g in groups for r in g.runs for s in r.scores])
    measures: list[Measure] = [(name, _score_of(kind), "{:.4f}") for kind, name in scores.items()]
    tables += [_table("Scores", groups, part) for part in _parts(measures)]
    others = list(dict.fromkeys(k for g in groups for k in g.others))
    for part in _parts(others):
        columns = [
            (name, [_cell(g.others[name]) if name in g.others else _EMPTY for g in groups])
            for name in part
        ]
        tables.append(_assembled("Other settings that differ", groups, columns))
    return [table for table in tables if len(table["columns"]) > 1]


def shared(groups: Sequence[Group]) -> list[dict[str, str]]:
    """Return name and value of the settings that all runs have in common."""
    found = shared_settings([run for group in groups for run in group.runs])
    return [{"name": name, "value": _cell(value)["text"]} for name, value in found.items()]


_EMPTY: dict[str, Any] = {"text": "", "sort": ""}


def _results(groups: Sequence[Group]) -> dict[str, Any]:
    """Return the first table: on a wide screen it has the settings of the labels as columns."""
    measures: list[Measure] = [
        ("final loss", lambda r: r.final, "{:.4f}"),
        ("validation loss", lambda r: r.valid[-1][1] if r.valid else None, "{:.4f}"),
        ("bits per byte", lambda r: r.valid[-1][2] if r.valid else None, "{:.4f}"),
        ("best loss", lambda r: r.best, "{:.4f}"),
        ("tokens", lambda r: float(r.tokens[-1]), "{:,.0f}"),
    ]
    columns = _measured(groups, measures)
    columns.append(("runs", [{"text": str(n := len(g.runs)), "sort": n} for g in groups]))
    states = [sorted({run.state for run in group.runs}) for group in groups]
    columns.append(("state", [{"text": "; ".join(s), "sort": s[0]} for s in states]))
    table = _assembled("Results", groups, columns)
    settings = list(dict.fromkeys(k for g in groups for k in g.differing))
    if settings:
        first = [{"name": k, "number": _numeric(groups, k), "css": "setting"} for k in settings]
        table["columns"][1:1] = first
        table["columns"][0]["css"] = "arm narrow"
        for group, row in zip(groups, table["rows"], strict=True):
            row[1:1] = [_cell(group.differing.get(k)) for k in settings]
    return table


def _costs(groups: Sequence[Group]) -> list[Measure]:
    longest = max(float(run.seconds[-1]) for group in groups for run in group.runs)
    unit, scale = ("hours", 3600.0) if longest >= _LONG else ("seconds", 1.0)
    form = "{:,.2f}" if unit == "hours" else "{:,.1f}"
    return [
        ("parameters", lambda r: r.parameters, "{:,.0f}"),
        ("training FLOPs", lambda r: None if r.flops is None else float(r.flops[-1]), "{:.3g}"),
        (unit, lambda r: float(r.seconds[-1]) / scale or None, form),
        ("seconds per step", _seconds_per_step, f"{{:,.{_decimals(groups)}f}}"),
        ("tokens/s", lambda r: r.tokens_per_second, "{:,.0f}"),
        ("MFU %", lambda r: None if r.mfu is None else 100 * r.mfu, "{:.1f}"),
        ("goodput %", lambda r: None if r.goodput is None else 100 * r.goodput, "{:.1f}"),
    ]


def _seconds_per_step(run: Run) -> float | None:
    """Return the seconds of a step of a run's mean size, at the speed over all of it."""
    if not run.tokens_per_second or not run.steps[-1]:
        return None
    return float(run.tokens[-1]) / float(run.steps[-1]) / run.tokens_per_second


def _decimals(groups: Sequence[Group]) -> int:
    """Return the decimals that the shortest time of a step needs for three digits."""
    times = [_seconds_per_step(run) for group in groups for run in group.runs]
    shortest = min((time for time in times if time), default=1.0)
    return max(2 - math.floor(math.log10(shortest)), 0)


def _score_of(kind: tuple[Any, ...]) -> Callable[[Run], float | None]:
    return lambda run: next((s.value for s in run.scores if s.kind == kind), None)


def _parts(items: Sequence[Any]) -> list[Sequence[Any]]:
    """Cut into as few parts as a screen allows, of about the same length."""
    count = -(-len(items) // _MOST_COLUMNS)
    size = -(-len(items) // count) if count else 1
    return [items[i : i + size] for i in range(0, len(items), size)]


def _table(heading: str, groups: Sequence[Group], measures: Sequence[Measure]) -> dict[str, Any]:
    return _assembled(heading, groups, _measured(groups, measures))


def _measured(
    groups: Sequence[Group], measures: Sequence[Measure]
) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the columns of numbers that any group has."""
    columns = []
    for name, value, form in measures:
        cells = []
        for group in groups:
            found = group.mean_of(value)
            if found is None:
                cells.append(_EMPTY)
                continue
            mean, spread = found
            text = form.format(mean) + (f" ± {form.format(spread)}" if spread else "")
            cells.append({"text": text, "sort": mean})
        if any(cell["text"] for cell in cells):
            columns.append((name, cells))
    return columns


def _assembled(
    heading: str, groups: Sequence[Group], columns: Sequence[tuple[str, list[dict[str, Any]]]]
) -> dict[str, Any]:
    heads = [{"name": "run", "number": False, "css": "arm"}]
    for name, cells in columns:
        number = any(not isinstance(cell["sort"], str) for cell in cells)
        heads.append({"name": name, "number": number, "css": ""})
    rows = []
    for index, group in enumerate(groups):
        first = {"text": group.label, "sort": group.label}
        rows.append([first, *(cells[index] for _, cells in columns)])
    colors = [color_of(index) for index in range(len(groups))]
    return {
        "heading": heading,
        "columns": heads,
        "rows": rows,
        "marks": [(c, _BORDERS[line]) for c, line in colors],
    }


def _numeric(groups: Sequence[Group], name: str) -> bool:
    return any(not isinstance(_cell(g.differing.get(name))["sort"], str) for g in groups)


def _cell(value: Any) -> dict[str, Any]:
    if value is None:
        return {"text": "-", "sort": ""}
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"text": str(value), "sort": _as_number(str(value))}
    return {"text": readable(value, 6) if isinstance(value, float) else f"{value:,}", "sort": value}


def _as_number(label: str) -> float | str:
    """Return what a column is sorted by where a grid's label is a number."""
    try:
        number = float(label)
    except ValueError:
        return label
    return number if math.isfinite(number) else label
