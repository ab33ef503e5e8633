"""Draw the report's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from evals.report.groups import Group
from evals.scaling.figures import add_legend, save
from pretrain.common.plots import plot_text

COLORS = [to_hex(f"C{index}") for index in range(10)]
STYLES = ["-", "--", ":", "-."]


def color_of(index: int) -> tuple[str, str]:
    """Return the color and line style of a group by its index, in pictures and on the page."""
    return COLORS[index % len(COLORS)], STYLES[index // len(COLORS) % len(STYLES)]


def draw_losses(groups: Sequence[Group], over: str, path: Path) -> Path | None:
    """Draw the training loss over ``tokens``, ``flops`` or ``seconds``; None if no run has them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    late, drawn = [], 0
    for i, group in enumerate(groups):
        color, style = color_of(i)
        for number, run in enumerate(group.runs):
            x = getattr(run, over)
            if x is None or not len(x) or not np.any(x > 0):
                continue
            axes.plot(
                x,
                run.loss,
                style,
                color=color,
                linewidth=1,
                label=plot_text(group.label, 60) if number == 0 else None,
            )
            for border in run.borders:
                axes.axvline(
                    np.interp(border[1], run.tokens, x), color=color, linewidth=0.6, linestyle=":"
                )
            first = len(run.loss) // 10 if len(run.loss) >= 30 else 0
            late += [run.loss[first], run.loss.min()]
            drawn += 1
    if not drawn:
        return None
    low, high = min(late), max(late)
    axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.02)
    labels = {"tokens": "tokens", "flops": "training FLOPs", "seconds": "seconds of training"}
    axes.set(xlabel=labels[over], ylabel="loss (nats per token)")
    figure.set_figheight(5 + add_legend(figure, axes, 8))
    return save(figure, path)


def draw_speeds(groups: Sequence[Group], path: Path) -> Path | None:
    """Draw every group's tokens per second, with MFU where known; None if no run has speeds."""
    speeds = [
        (g.label, g.mean([r.tokens_per_second for r in g.runs]), g.mean([r.mfu for r in g.runs]))
        for g in groups
    ]
    known = [(label, s[0], m) for label, s, m in speeds if s is not None][::-1]
    if not known:
        return None
    figure = Figure(figsize=(8, 0.35 * len(known) + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(known)), [s for _, s, _ in known], color="tab:blue", alpha=0.7)
    axes.set_yticks(range(len(known)), [plot_text(label, 40) for label, _, _ in known], fontsize=7)
    for i, (_, speed, mfu) in enumerate(known):
        text = f" {speed:,.0f}" + (f", MFU {100 * mfu[0]:.1f} %" if mfu else "")
        axes.text(speed, i, text, va="center", fontsize=7)
    axes.set_xlim(0, 1.25 * max(s for _, s, _ in known))
    axes.set(xlabel="tokens per second (over the run)")
    return save(figure, path)
