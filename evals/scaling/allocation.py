"""Share a budget between size and tokens with any law of sizes, and draw its predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evals.scaling.curves import Points
from evals.scaling.figures import save
from evals.scaling.fitting import Fit
from evals.scaling.intervals import ends_of
from evals.scaling.parameters import Array
from evals.scaling.planning import SizeChoice
from evals.scaling.point_intervals import point_interval

STEPS = 1201  # sizes that are tried, in steps of 1 % or less
DECADES = 2.5  # on each side of the middle of the fitted sizes and tokens


def along_budget(
    sizes: Array,
    flops: float,
    unique_tokens: float | None = None,
    experts_ratio: float | None = None,
) -> Points:
    """Return runs of these sizes, each with the tokens that ``flops`` = 6 N D allow."""
    tokens = flops / (6 * sizes)
    return Points(
        sizes,
        tokens,
        np.ones(len(sizes)),
        None if unique_tokens is None else np.minimum(tokens, unique_tokens),
        total_parameters=None if experts_ratio is None else sizes * experts_ratio,
    )


def best_allocation(
    found: Fit,
    flops: float,
    unique_tokens: float | None = None,
    experts_ratio: float | None = None,
) -> SizeChoice:
    """Return the N and D of the lowest predicted loss for ``flops`` = 6 N D.

    With limited data every run sees at most ``unique_tokens`` different tokens; with experts every
    size has ``experts_ratio`` times as many parameters in all.
    """
    low, high = found.domain["parameters"]
    least, most = found.domain["tokens"]
    middle = np.sqrt(np.sqrt(low * high / (least * most)) * flops / 6)
    sizes = middle * np.logspace(-DECADES, DECADES, STEPS)
    points = along_budget(sizes, flops, unique_tokens, experts_ratio)
    losses = found.predict(points)
    best = int(np.argmin(losses))
    n = float(sizes[best])
    ends: list[tuple[float, float] | None] = [None, None, None]
    if found.samples is not None:
        chosen = sizes[np.argmin(found.predict_samples(points), axis=1)]
        for i, values in enumerate((chosen, flops / (6 * chosen))):
            ends[i] = (float(ends_of(values)[0]), float(ends_of(values)[1]))
        below, above = point_interval(found, points.only([best]))
        ends[2] = (float(below[0]), float(above[0]))
    alike = sizes[losses <= 1.005 * losses[best]]
    return SizeChoice(
        flops,
        n,
        flops / (6 * n),
        float(losses[best]),
        ends[0],
        ends[1],
        ends[2],
        (float(alike.min()), float(alike.max())),
    )


def draw_allocation(
    found: Fit,
    choice: SizeChoice,
    path: Path,
    unique_tokens: float | None = None,
    experts_ratio: float | None = None,
) -> Path:
    """Draw the predicted loss by model size for a budget, with its interval."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    sizes = choice.parameters * np.logspace(-1, 1, 101)
    points = along_budget(sizes, choice.flops, unique_tokens, experts_ratio)
    axes.plot(sizes, found.predict(points), color="tab:blue")
    if found.samples is not None:
        low, high = point_interval(found, points)
        axes.fill_between(sizes, low, high, color="tab:blue", alpha=0.2, linewidth=0)
    label = f"{choice.parameters:.3g} parameters, {choice.tokens:.3g} tokens"
    axes.plot([choice.parameters], [choice.loss], "o", color="tab:orange", label=label)
    axes.set(xscale="log", xlabel="parameters", ylabel="loss", title=f"{choice.flops:.3g} FLOPs")
    axes.legend(fontsize=8)
    return save(figure, path)


def draw_predictions(
    found: Fit, points: Sequence[Points], logged: Sequence[bool], path: Path
) -> Path:
    """Draw predicted losses by compute with their intervals, and the logged ones."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for i, (some, seen) in enumerate(zip(points, logged, strict=True)):
        flops, predicted = np.asarray(some.flops), found.predict(some)
        color = f"C{i % 10}"
        if found.samples is not None:
            low, high = point_interval(found, some)
            sides = np.abs(np.stack([low, high]) - predicted)
            axes.errorbar(flops, predicted, sides, fmt="none", color=color, capsize=3)
        axes.plot(flops, predicted, "_", color=color, markersize=10, label=some.name)
        if seen:
            axes.plot(flops, some.loss, "x", color="black", label=f"{some.name}, logged")
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss", title=found.law.title)
    axes.legend(fontsize=8)
    return save(figure, path)
