"""Draw fits, predictions, plans and comparisons."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from evals.scaling.comparing import Comparison, budgets
from evals.scaling.curves import Curve, Points
from evals.scaling.fitting import Fit
from evals.scaling.intervals import interval
from evals.scaling.planning import Choice, SizeChoice
from evals.scaling.size_laws import ChinchillaLaw
from pretrain.common.files import write_figure
from pretrain.common.plots import plot_text

COLORS = [f"tab:{c}" for c in ("blue", "orange", "green", "red", "purple", "brown", "pink", "cyan")]


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, with grid lines, and return its path."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, dpi=130)
    return path


def draw_curves(
    found: Fit, curves: Sequence[Curve], path: Path, others: Sequence[Curve] = ()
) -> Path:
    """Draw data and fit above, residuals below; ``others``, which were not fitted, are dashed."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    low = []
    for i, curve in enumerate([*curves, *others]):
        color, fitted = COLORS[i % len(COLORS)], i < len(curves)
        predicted = found.predict(curve)
        top.plot(curve.step, curve.loss, ".", color=color, markersize=2.5, alpha=0.5)
        error = 100 * np.abs(predicted / curve.loss - 1).mean()
        label = plot_text(f"{curve.name}: {error:.3f} %{'' if fitted else ', not fitted'}")
        top.plot(
            curve.step, predicted, "-" if fitted else "--", color=color, linewidth=1.3, label=label
        )
        bottom.plot(curve.step, 100 * (predicted / curve.loss - 1), color=color, linewidth=0.9)
        low.append(np.quantile(curve.loss, 0.97))
    top.set(ylabel="loss (nats per token)", title=f"{found.law.title}: {found.law.formula}")
    lowest = min(c.loss.min() for c in [*curves, *others])
    top.set_ylim(lowest - 0.05 * (max(low) - lowest), max(low) + 0.1 * (max(low) - lowest))
    top.legend(fontsize=8, title="data, fit, mean absolute error", title_fontsize=8)
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="optimizer step", ylabel="predicted / logged - 1 (%)")
    return save(figure, path)


def draw_points(found: Fit, points: Points, path: Path) -> Path:
    """Draw loss by compute with the law at each size, residuals, and Chinchilla's frontier."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    flops, predicted = np.asarray(points.flops), found.predict(points)
    sizes = np.unique(points.parameters)
    for i, size in enumerate(sizes):
        at = points.parameters == size
        color = f"C{i % 10}" if len(sizes) <= 10 else "tab:blue"
        label = f"{size:.3g} parameters" if len(sizes) <= 10 else None
        top.plot(flops[at], points.loss[at], "o", color=color, markersize=4, label=label)
        order = np.argsort(flops[at])
        top.plot(flops[at][order], predicted[at][order], "-", color=color, linewidth=1)
        bottom.plot(
            flops[at], 100 * (predicted[at] / points.loss[at] - 1), "o", color=color, markersize=4
        )
    if isinstance(found.law, ChinchillaLaw):
        grid = np.geomspace(flops.min(), flops.max() * 10, 100)
        n, d = found.law.optimum(found.values, grid)
        frontier = found.predict(Points(n, d, np.ones(100)))
        top.plot(grid, frontier, "k--", linewidth=1, label="compute-optimal")
    top.set(
        xscale="log",
        ylabel="loss (nats per token)",
        title=f"{found.law.title}: {found.law.formula}",
    )
    if top.get_legend_handles_labels()[0]:
        top.legend(fontsize=8)
    bottom.axhline(0, color="black", linewidth=0.6)
    bottom.set(xlabel="training FLOPs", ylabel="predicted / logged - 1 (%)")
    return save(figure, path)


def draw_prediction(found: Fit, curves: Sequence[Curve], seen: Sequence[bool], path: Path) -> Path:
    """Draw predicted curves with intervals and any logged losses, and the learning rates below."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    highest = []
    for i, (curve, has_loss) in enumerate(zip(curves, seen, strict=True)):
        color, predicted = COLORS[i % len(COLORS)], found.predict(curve)
        top.plot(
            curve.step,
            predicted,
            color=color,
            linewidth=1.3,
            label=plot_text(f"{curve.name}: ends at {predicted[-1]:.4f}"),
        )
        if found.samples is not None:
            low, high = interval(found, curve)
            top.fill_between(curve.step, low, high, color=color, alpha=0.2, linewidth=0)
        if has_loss:
            top.plot(curve.step, curve.loss, ".", color=color, markersize=2.5, alpha=0.5)
        bottom.plot(np.arange(len(curve.lr)), curve.lr, color=color, linewidth=1)
        highest.append(predicted[len(predicted) // 20])
    top.set(ylabel="loss (nats per token)", title=f"{found.law.title}, 95 % intervals")
    bottom_loss = min(found.predict(c).min() for c in curves)
    top.set_ylim(bottom_loss - 0.05 * (max(highest) - bottom_loss), max(highest))
    top.legend(fontsize=8)
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
    axes.set_yticks(range(len(shown)), [plot_text(c.name) for c in shown], fontsize=8)
    axes.set(xlabel=f"predicted final loss above the best, {best:.4f} (thousandths of a nat)")
    return save(figure, path)


def draw_sizes(found: Fit, choice: SizeChoice, path: Path) -> Path:
    """Draw the predicted loss by model size for a budget."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = choice.parameters * np.logspace(-1, 1, 101)
    points = Points(sizes, choice.flops / (6 * sizes), np.ones(101))
    axes.plot(sizes, found.predict(points), color="tab:blue")
    if found.samples is not None:
        low, high = interval(found, points)
        axes.fill_between(sizes, low, high, color="tab:blue", alpha=0.2, linewidth=0)
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
        title=f"{choice.flops:.3g} FLOPs",
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
