"""Share a budget between size and tokens with any law of sizes, and draw predictions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from evals.scaling.curves import Points
from evals.scaling.extrapolating import refuse_moved
from evals.scaling.figures import save
from evals.scaling.fitting import Fit
from evals.scaling.parameters import Array
from evals.scaling.planning import SizeChoice, pair_of, size_choice
from evals.scaling.point_intervals import outside, point_interval

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
    size has ``experts_ratio`` times as many parameters in all. Raises UserError where nothing
    determines the answer.
    """
    low, high = found.domain["parameters"]
    least, most = found.domain["tokens"]
    middle = np.sqrt(np.sqrt(low * high / (least * most)) * flops / 6)
    sizes = middle * np.logspace(-DECADES, DECADES, STEPS)
    points = along_budget(sizes, flops, unique_tokens, experts_ratio)

    def lowest(of: Fit) -> float:
        return float(sizes[np.argmin(of.predict(points))])

    refuse_moved(
        found, lowest, "the best size", "fit runs of more sizes and more numbers of tokens for each"
    )
    losses = found.predict(points)
    best = int(np.argmin(losses))
    chosen, of_loss = None, None
    if found.samples is not None:
        chosen = sizes[np.argmin(found.predict_samples(points), axis=1)]
        of_loss = pair_of(point_interval(found, points.only([best])))
    return size_choice(
        flops,
        float(sizes[best]),
        float(losses[best]),
        sizes,
        losses,
        chosen,
        of_loss,
        extrapolates=outside(found.domain, points.only([best]))[0],
    )


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
    fitted = found.domain["flops"][1]
    furthest = max(float(np.max(np.asarray(some.flops))) for some in points)
    if furthest > 1.001 * fitted:
        label = f"beyond the fitted runs, up to {furthest / fitted:.3g} x"
        axes.axvspan(fitted, furthest, color="gray", alpha=0.12, linewidth=0, label=label)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss", title=found.law.title)
    axes.legend(fontsize=8)
    return save(figure, path)
