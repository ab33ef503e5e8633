"""Draw the statistics of a run's blocks: heat maps, block by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evals.report.runs import Run
from evals.scaling.figures import save
from pretrain.common.plots import plot_text
from pretrain.run_directory import RunDirectory

# What is drawn where a run has it, and in words.
MEASURES = {
    "activation_rms": "activations, RMS",
    "activation_max": "activations, largest",
    "gradient_rms": "gradients, RMS",
    "weight_rms": "weights, RMS",
    "update_ratio": "updates against weights",
    "logit_max": "attention logits, largest",
    "horizon": "memory horizon (tokens)",
    "state_norm": "states, norm",
    "state_rank": "states, effective rank",
    "expert_load_max": "busiest expert against the mean",
    "newton_residual_max": "Newton residuals",
    "activation_nonfinite": "activations not finite (share)",
    "gradient_nonfinite": "gradients not finite (share)",
}
_MOST_LABELS = 24


def draw_blocks(run: Run, path: Path) -> Path | None:
    """Draw a map of each measure of a run; None where it has no statistics of blocks."""
    rows = RunDirectory(run.directory).read_blocks()
    names = list(dict.fromkeys(_label(block) for row in rows for block in row["blocks"]))
    maps = {name: _values(rows, names, name) for name in MEASURES}
    maps = {name: values for name, values in maps.items() if np.any(values > 0)}
    if not maps:
        return None
    down = -(-len(maps) // 2)
    height = down * (1.2 + 0.16 * min(len(names), _MOST_LABELS))
    figure = Figure(figsize=(11, height), layout="constrained")
    figure.suptitle(plot_text(run.name, 80), fontsize=9)
    steps = [row["step"] for row in rows]
    for axes, (name, values) in zip(figure.subplots(down, 2).flat, maps.items(), strict=False):
        values = np.where(values > 0, values, np.nan)  # a logarithm has no zero
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
        norm = LogNorm(low, high if high > low else low * 1.01)
        image = axes.pcolormesh(_edges(steps), np.arange(len(names) + 1), values, norm=norm)
        bar = figure.colorbar(image, ax=axes, format=FuncFormatter(lambda x, _: f"{x:g}"))
        if high < 20 * low:  # few powers of ten, or none
            bar.set_ticks([x for x in MaxNLocator(5).tick_values(low, high) if low <= x <= high])
        bar.ax.minorticks_off()
        bar.ax.tick_params(labelsize=7)
        every = -(-len(names) // _MOST_LABELS)
        places = range(0, len(names), every)
        axes.set_yticks([i + 0.5 for i in places], [names[i] for i in places], fontsize=6)
        axes.invert_yaxis()
        axes.set_xlabel("step", fontsize=7)
        axes.set_title(MEASURES[name], fontsize=8)
        axes.tick_params(axis="x", labelsize=7)
    for axes in figure.axes:
        if not axes.collections and not axes.images:
            axes.set_visible(False)
    return save(figure, path, grid=False)


def _label(block: dict[str, Any]) -> str:
    return " ".join(str(block[key]) for key in ("block", "mixer") if key in block)


def _values(rows: Sequence[dict[str, Any]], names: Sequence[str], measure: str) -> np.ndarray:
    """Return a measure ``[blocks, steps]``, NaN where a block has none."""
    values = np.full((len(names), len(rows)), np.nan)
    for column, row in enumerate(rows):
        for block in row["blocks"]:
            found = block.get(measure)
            if found is not None:
                values[names.index(_label(block)), column] = found
    return values


def _edges(steps: Sequence[int]) -> list[float]:
    """Return where the column of each step begins, and where the last one ends."""
    between = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    first = steps[0] - (between[0] - steps[0] if between else 0.5)
    last = steps[-1] + (steps[-1] - between[-1] if between else 0.5)
    return [first, *between, last]
