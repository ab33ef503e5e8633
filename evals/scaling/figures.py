"""Draw fits, predictions, plans and comparisons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from evals.scaling.comparing import Comparison, budgets
from evals.scaling.curves import Curve, Points
from evals.scaling.extrapolating import MARGIN, outside_of
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from evals.scaling.parameters import Array
from evals.scaling.planning import Choice, SizeChoice
from evals.scaling.point_intervals import point_interval
from evals.scaling.size_laws import ChinchillaLaw, isoflop_profiles
from pretrain.common.files import write_figure
from pretrain.common.plots import plot_text

COLORS = [f"tab:{c}" for c in ("blue", "orange", "green", "red", "purple", "brown", "pink", "cyan")]
IN_AXES, MOST_SIZES = 10, 10  # lines that a legend inside the axes names, sizes with a name each
LONG = 8  # times the shortest curve: from there on steps have a logarithmic axis


def save(figure: Figure, path: Path, *, grid: bool = True) -> Path:
    """Write a figure, with grid lines unless they would lie on a map, and return its path."""
    for axes in figure.axes if grid else ():
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, dpi=130)
    return path


def colors_of(count: int) -> list[Any]:
    """Return ``count`` colors that differ: well-known ones, or many along a map."""
    if count <= len(COLORS):
        return COLORS[:count]
    return [colormaps["turbo"](x) for x in np.linspace(0.03, 0.97, count)]


def add_legend(part: Any, axes: Any, width: float, title: str | None = None) -> float:
    """Name what is drawn: inside the axes, or if that is much in columns below ``part``.

    ``part`` is a figure ``width`` inches wide, or a part of one. Returns the inches that the legend
    adds below.
    """
    handles, labels = axes.get_legend_handles_labels()
    if len(labels) <= IN_AXES:
        axes.legend(handles, labels, fontsize=8, title=title, title_fontsize=8)
        return 0.0
    columns = max(1, min(5, int(17 * width) // (max(map(len, labels)) + 8)))
    part.legend(
        *(handles, labels),
        loc="outside lower center",
        ncols=columns,
        fontsize=6.5,
        title=title,
        title_fontsize=7,
    )
    return 0.14 * -(-len(labels) // columns) + 0.3


def draw_curves(
    found: Fit, curves: Sequence[Curve], path: Path, others: Sequence[Curve] = ()
) -> Path:
    """Draw data and fit above, residuals below; ``others``, which were not fitted, to the right."""
    sets = [("fitted", list(curves)), *([("held out", list(others))] if others else [])]
    width = 10 if len(sets) == 1 else 14
    figure = Figure(figsize=(width, 7), layout="constrained")
    parts: Any = figure.subfigures(1, len(sets), squeeze=False)[0]
    every, tops, bottoms, added = [*curves, *others], list[Any](), list[Any](), 0.0
    for part, (what, shown) in zip(parts, sets, strict=True):
        top, bottom = part.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        tops.append(top)
        bottoms.append(bottom)
        many = len(shown) > IN_AXES
        errors = []
        for curve, color in zip(shown, colors_of(len(shown)), strict=True):
            predicted = found.predict(curve)
            residual = 100 * (predicted / curve.loss - 1)
            errors.append(float(np.abs(residual).mean()))
            size = {"markersize": 1.5, "alpha": 0.3} if many else {"markersize": 2.5, "alpha": 0.5}
            top.plot(curve.step, curve.loss, ".", color=color, **size)
            label = plot_text(f"{curve.name}: {errors[-1]:.3f} %", 60)
            line = 0.8 if many else 1.3
            top.plot(curve.step, predicted, color=color, linewidth=line, label=label)
            if what == "held out" and found.samples is not None:
                low, high = interval(found, curve)
                top.fill_between(curve.step, low, high, color=color, alpha=0.15, linewidth=0)
            bottom.plot(curve.step, residual, color=color, linewidth=0.7 * line)
        shaded = " with 95 % intervals" if what == "held out" and found.samples is not None else ""
        top.set_title(
            f"{what}{shaded}: {len(shown)} curve{'s' if len(shown) > 1 else ''}, "
            f"mean error {np.mean(errors):.3f} %",
            fontsize=10,
        )
        last = [int(c.step[-1]) for c in shown]
        if max(last) > LONG * min(last):
            top.set_xscale("log")
        room = width / len(sets)
        added = max(added, add_legend(part, top, room, "data, fit, mean absolute error"))
        bottom.axhline(0, color="black", linewidth=0.6)
        bottom.set(xlabel="optimizer step")
    tops[0].set(ylabel="loss (nats per token)")
    bottoms[0].set(ylabel="predicted / logged - 1 (%)")
    lowest = min(c.loss.min() for c in every)
    highest = max(np.quantile(c.loss, 0.97) for c in every)
    ends = [axes.get_ylim() for axes in bottoms]
    for top, bottom in zip(tops, bottoms, strict=True):
        top.set_ylim(lowest - 0.05 * (highest - lowest), highest + 0.1 * (highest - lowest))
        bottom.set_ylim(min(e[0] for e in ends), max(e[1] for e in ends))
    figure.set_figheight(7 + added)
    figure.suptitle(f"{found.law.title}: {found.law.formula}", fontsize=11)
    return save(figure, path)


def draw_points(found: Fit, points: Points, path: Path) -> Path:
    """Draw loss by compute with the law at each size, residuals, and Chinchilla's frontier.

    Runs of equal budgets are drawn by size to the right, with a parabola for each budget.
    """
    profiles = isoflop_profiles(points)
    if sum(profile["inside"] for profile in profiles) < 2:  # sizes that are alike by chance
        profiles = []
    figure = Figure(figsize=(15 if profiles else 10, 7), layout="constrained")
    parts: list[Any] = [figure]
    if profiles:
        parts = list(figure.subfigures(1, 2, squeeze=False, width_ratios=(3, 2))[0])
    left = parts[0]
    top, bottom = left.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    flops, predicted = np.asarray(points.flops), found.predict(points)
    sizes = np.unique(points.parameters)
    few = len(sizes) <= MOST_SIZES
    shades = (
        colors_of(len(sizes)) if few else colormaps["viridis"](np.linspace(0, 0.95, len(sizes)))
    )
    for size, color in zip(sizes, shades, strict=True):
        at = points.parameters == size
        label = f"{size:.3g} parameters" if few else None
        top.plot(flops[at], points.loss[at], "o", color=color, markersize=4, label=label)
        order = np.argsort(flops[at])
        top.plot(flops[at][order], predicted[at][order], "-", color=color, linewidth=1)
        residual = 100 * (predicted[at] / points.loss[at] - 1)
        bottom.plot(flops[at], residual, "o", color=color, markersize=4)
    if not few:
        norm = LogNorm(sizes[0], sizes[-1])
        shown = ScalarMappable(norm, colormaps["viridis"])
        left.colorbar(shown, ax=[top, bottom], label="parameters", pad=0.01)
    if isinstance(found.law, ChinchillaLaw):
        grid = np.geomspace(flops.min(), flops.max() * 10, 100)
        n, d = found.law.optimum(found.values, grid)
        frontier, inside = found.predict(Points(n, d, np.ones(100))), grid <= flops.max()
        top.plot(grid[inside], frontier[inside], "k--", linewidth=1, label="compute-optimal")
        top.plot(
            *(grid[~inside], frontier[~inside]),
            "k:",
            linewidth=1,
            label="the same, beyond the fitted runs",
        )
    top.set(xscale="log", ylabel="loss (nats per token)")
    top.set_title(f"{found.law.title}: {found.law.formula}", fontsize=10)
    if top.get_legend_handles_labels()[0]:
        top.legend(fontsize=8)
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="training FLOPs", ylabel="predicted / logged - 1 (%)")
    if profiles:
        _draw_profiles(parts[1].subplots(), points, profiles)
    return save(figure, path)


def _draw_profiles(axes: Any, points: Points, profiles: Sequence[dict[str, Any]]) -> None:
    """Draw the losses of each budget by size, their parabola, and its minimum."""
    places = {name: i for i, name in enumerate(points.names)}
    every = colormaps["viridis"](np.linspace(0, 0.9, len(profiles)))
    for profile, color in zip(profiles, every, strict=True):
        runs = [places[name] for name in profile["runs"]]
        size, (curvature, slope, level, middle) = points.parameters[runs], profile["parabola"]
        ends = np.log([*size, profile["parameters"]] if profile["inside"] else size)
        logs = np.linspace(ends.min(), ends.max(), 100) - middle
        label = f"{profile['flops']:.2g} FLOPs" if len(profiles) <= MOST_SIZES else None
        axes.plot(size, points.loss[runs], "o", color=color, markersize=4, label=label)
        parabola = level + slope * logs + curvature * logs**2
        axes.plot(np.exp(logs + middle), parabola, color=color, linewidth=1)
        if profile["inside"]:
            axes.plot(profile["parameters"], profile["loss"], "*", color=color, markersize=11)
    axes.plot([], [], "k*", markersize=9, linestyle="none", label="minima within the runs")
    axes.set(xscale="log", xlabel="parameters", ylabel="loss (nats per token)")
    axes.set_title("isoFLOP profiles: parabolas in the logarithm of the size", fontsize=10)
    axes.legend(fontsize=8)


def draw_prediction(found: Fit, curves: Sequence[Curve], seen: Sequence[bool], path: Path) -> Path:
    """Draw predicted curves with intervals and any logged losses, and the learning rates below."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    highest = []
    many, colors = len(curves) > IN_AXES, colors_of(len(curves))
    for curve, has_loss, color in zip(curves, seen, colors, strict=True):
        predicted = found.predict(curve)
        beyond = f" ({note})" if (note := outside_of(found, curve)) else ""
        top.plot(
            curve.step,
            predicted,
            color=color,
            linewidth=0.8 if many else 1.3,
            label=plot_text(f"{curve.name}: ends at {predicted[-1]:.4f}{beyond}", 100),
        )
        if found.samples is not None:
            low, high = interval(found, curve)
            shade = 0.1 if many else 0.2
            top.fill_between(curve.step, low, high, color=color, alpha=shade, linewidth=0)
        if has_loss:
            top.plot(curve.step, curve.loss, ".", color=color, markersize=2.5, alpha=0.5)
        bottom.plot(np.arange(len(curve.lr)), curve.lr, color=color, linewidth=1)
        highest.append(predicted[len(predicted) // 20])
    steps = found.domain.get("steps")
    furthest = max(int(curve.step[-1]) for curve in curves)
    if steps and furthest > MARGIN * steps[1]:
        label = f"beyond the fitted steps, up to {furthest / steps[1]:.1f} x"
        top.axvspan(steps[1], furthest, color="gray", alpha=0.12, linewidth=0, label=label)
    kind = "95 % intervals" if found.samples is not None else "without intervals"
    top.set(ylabel="loss (nats per token)", title=f"{found.law.title}, {kind}")
    bottom_loss = min(found.predict(c).min() for c in curves)
    top.set_ylim(bottom_loss - 0.05 * (max(highest) - bottom_loss), max(highest))
    figure.set_figheight(7 + add_legend(figure, top, 10))
    bottom.set(xlabel="optimizer step", ylabel="learning rate")
    return save(figure, path)


def draw_schedules(choices: Sequence[Choice], path: Path, most: int = 15) -> Path:
    """Draw the ``most`` best schedules' predicted final losses."""
    shown = list(choices[:most])[::-1]
    figure = Figure(figsize=(10, 0.4 * len(shown) + 1.5), layout="constrained")
    axes = figure.subplots()
    best = choices[0].loss
    values = np.array([c.loss - best for c in shown])
    axes.barh(range(len(shown)), 1000 * values, color="tab:blue", alpha=0.7)
    if shown[0].behind is not None:
        ends = 1000 * np.array([c.behind or (0, 0) for c in shown])
        sides = np.abs(ends.T - 1000 * values)
        axes.errorbar(
            1000 * values,
            range(len(shown)),
            xerr=sides,
            fmt="none",
            color="black",
            linewidth=1,
            capsize=2,
        )
    notes = {c.extrapolates for c in shown}
    names = [f"{c.name} ({c.extrapolates})" if len(notes) > 1 else c.name for c in shown]
    names = [name.removesuffix(" ()") for name in names]
    if len(notes) == 1 and (note := notes.pop()):
        axes.set_title(f"all extrapolate: {note}", fontsize=10)
    axes.set_yticks(range(len(shown)), [plot_text(name) for name in names], fontsize=8)
    around = choices[0].interval
    of_best = f"{best:.4f}" + (f" ({around[0]:.4f} to {around[1]:.4f})" if around else "")
    axes.set(xlabel=f"thousandths of a nat above the lowest predicted loss,\n{of_best}")
    return save(figure, path)


def draw_sizes(found: Fit, choice: SizeChoice, path: Path, runs: Callable[[Array], Points]) -> Path:
    """Draw the predicted loss by model size for a budget, of which ``runs`` of any sizes make use.

    Intervals are of a run's loss.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = choice.parameters * np.logspace(-1, 1, 101)
    points = runs(sizes)
    axes.plot(sizes, found.predict(points), color="tab:blue")
    if found.samples is not None:
        low, high = point_interval(found, points)
        axes.fill_between(sizes, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    shown = [e for e in found.domain.get("parameters") or () if sizes[0] <= e <= sizes[-1]]
    for i, end in enumerate(shown):
        label = None if i else "ends of the fitted sizes"
        axes.axvline(end, color="gray", linestyle=":", linewidth=1, label=label)
    axes.axvspan(*choice.alike, color="tab:green", alpha=0.15, label="within 0.5 % of the best")
    axes.plot(
        [choice.parameters],
        [choice.loss],
        "o",
        color="tab:orange",
        label=f"{choice.parameters:.3g} parameters, {choice.tokens:.3g} tokens",
    )
    axes.set(
        xscale="log",
        xlabel="parameters",
        ylabel="loss (nats per token)",
        title=f"{choice.flops:.3g} FLOPs"
        + (f", extrapolated: {choice.extrapolates}" if choice.extrapolates else ""),
    )
    axes.legend(fontsize=8)
    return save(figure, path)


def draw_comparison(
    fits: dict[str, Fit], families: dict[str, Points], comparisons: Sequence[Comparison], path: Path
) -> Path:
    """Draw each family's runs and law, and where laws cross."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots()
    every = np.concatenate([np.asarray(p.flops) for p in families.values()])
    ends = [c.target for c in comparisons]
    grid = np.geomspace(every.min(), max([every.max() * 3, *ends]), 200)
    at: Any = budgets(grid)
    for i, (name, found) in enumerate(fits.items()):
        color = COLORS[i % len(COLORS)]
        axes.plot(
            np.asarray(families[name].flops), families[name].loss, "o", color=color, markersize=4
        )
        axes.plot(grid, found.predict(at), color=color, label=plot_text(name))
        low, high = interval(found, at)
        axes.fill_between(grid, low, high, color=color, alpha=0.15, linewidth=0)
    if grid[-1] > 1.001 * every.max():
        label = f"beyond the runs, up to {grid[-1] / every.max():.3g} x"
        axes.axvspan(every.max(), grid[-1], color="gray", alpha=0.12, linewidth=0, label=label)
    for comparison in comparisons:
        if comparison.crossing is not None:
            axes.axvline(comparison.crossing, color="gray", linestyle=":", linewidth=1)
    axes.set(
        xscale="log",
        xlabel="training FLOPs",
        ylabel="loss (nats per token)",
        title="laws with 95 % intervals, crossings dotted",
    )
    axes.legend(fontsize=8)
    return save(figure, path)
