"""The table and the picture of ``python -m pretrain coordinates``."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from pretrain.common.files import write_figure
from pretrain.common.screen import plain_console, show_table, titled_table

# Of the slope of sizes over widths, both logarithmic. By the standard parametrization it is 0.5 or
# 1; finite widths bend what is flat in the limit.
TOLERANCE = 0.35


@dataclass(frozen=True)
class Place:
    """Somewhere in the model whose outputs are measured.

    Attributes:
        name: Of a matrix, such as ``gdn.q_proj``, or a layer, such as ``gdn``.
        block: The number of its block, empty outside the blocks.
        layer: Whether it is a mixer, an MLP or the residual stream, and not a matrix.
    """

    name: str
    block: str = ""
    layer: bool = False


Sizes = dict[Place, dict[int, dict[int, tuple[float, float]]]]
"""By place, seed and width: root mean squares of the output, and of its change by training."""


@dataclass
class Slope:
    """The slope of sizes over widths: its mean over ``count`` models and layers, standard error."""

    mean: float
    error: float
    count: int

    @property
    def finite(self) -> bool:
        """Return whether every size was more than 0, and finite."""
        return math.isfinite(self.mean)

    @property
    def direction(self) -> int:
        """Return 1 or -1 where the slope's 95 % interval lies beyond the tolerance, else 0."""
        half = student.ppf(0.975, self.count - 1) * self.error
        beyond = self.finite and abs(self.mean) - half > TOLERANCE
        return int(math.copysign(1, self.mean)) if beyond else 0

    @property
    def unclear(self) -> bool:
        """Return whether the slope is beyond the tolerance, but its interval is not."""
        return self.finite and abs(self.mean) > TOLERANCE and not self.direction

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.error:.2f}"


@dataclass
class Row:
    """A line of the table: sizes by width, and their slopes, of one layer or one kind of matrix."""

    name: str
    layer: bool
    activations: dict[int, float]
    updates: dict[int, float]
    activation_slope: Slope
    update_slope: Slope

    @property
    def faults(self) -> list[str]:
        """Return what follows the width, in words.

        The output of a matrix may become smaller: of those whose outputs are a result, such as
        logits, the start vanishes with the width, and what they learn remains.
        """
        found = []
        for what, slope in (("output", self.activation_slope), ("change", self.update_slope)):
            may_shrink = what == "output" and not self.layer
            if not slope.finite:
                found.append(f"{what} is 0 or not finite")
            elif slope.direction > 0:
                found.append(f"{what} grows")
            elif slope.direction < 0 and not may_shrink:
                found.append(f"{what} shrinks")
        return found

    @property
    def verdict(self) -> str:
        """Return ``flat``, what follows the width, or ``unclear`` where the slopes do not say."""
        slopes = [self.update_slope]
        if self.layer or self.activation_slope.mean > 0:
            slopes.append(self.activation_slope)
        clear = "unclear" if any(slope.unclear for slope in slopes) else "flat"
        return ", ".join(self.faults) or clear


def rows_of(sizes: Sizes) -> list[Row]:
    """Return a row for each layer, and one for each matrix, over all blocks that have it."""
    together: dict[str, list[Place]] = {}
    for place in sizes:
        name = f"{place.block} {place.name}" if place.layer else place.name
        together.setdefault(name, []).append(place)
    rows = []
    for name, places in together.items():
        series = [by_width for place in places for by_width in sizes[place].values()]
        pairs: list[Any] = []
        for which in (0, 1):
            single = [{width: s[which] for width, s in each.items()} for each in series]
            pairs.append((_means(single), _slope(single)))
        (activations, slope), (updates, update_slope) = pairs
        rows.append(Row(name, places[0].layer, activations, updates, slope, update_slope))
    return rows


def _means(series: list[dict[int, float]]) -> dict[int, float]:
    """Return the geometric mean over series for each width."""
    return {
        width: float(np.exp(np.mean([math.log(max(s[width], 1e-300)) for s in series])))
        for width in series[0]
    }


def _slope(series: list[dict[int, float]]) -> Slope:
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = [np.polyfit(np.log(list(s)), np.log(list(s.values())), 1)[0] for s in series]
    error = float(np.std(slopes, ddof=1) / math.sqrt(len(slopes)))
    return Slope(float(np.mean(slopes)), error, len(slopes))


def print_table(sizes: Sizes, title: str) -> bool:
    """Print the sizes, slopes and verdicts; return whether everything is flat."""
    rows = rows_of(sizes)
    widths = list(rows[0].activations)
    console = plain_console(width=max(120, 60 + 24 * len(widths)))
    sizes_of = [[*(f"{what} {width}" for width in widths), "slope"] for what in ("size", "change")]
    columns = ("output of", *sizes_of[0], *sizes_of[1], "verdict")
    for layers, heading in ((True, "layers"), (False, "matrices, over all blocks")):
        table = titled_table(f"{title}: {heading}", *columns, left=("verdict",))
        for row in rows:
            if row.layer == layers:
                table.add_row(
                    row.name,
                    *(f"{x:.3g}" for x in row.activations.values()),
                    str(row.activation_slope),
                    *(f"{x:.3g}" for x in row.updates.values()),
                    str(row.update_slope),
                    row.verdict,
                )
        show_table(table, console)
    counts = Counter("not flat" if row.faults else row.verdict for row in rows)
    print(
        "Sizes are root mean squares, slopes those of their logarithm: 0.5 is growth by the root "
        "of the width. The error is the standard error over models and blocks; not flat is a slope "
        f"whose 95 % interval lies beyond {TOLERANCE:g}.\n"
        + ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        + (": more --seeds would tell" if counts["unclear"] else "")
    )
    return not counts["not flat"]


def draw(sizes: Sizes, title: str, path: Path) -> None:
    """Draw the sizes over the width, of layers above and of matrices below, in a PNG file."""
    from matplotlib import color_sequences
    from matplotlib.figure import Figure

    rows = rows_of(sizes)
    figure = Figure(figsize=(14, 11), layout="constrained")
    figure.suptitle(title, parse_math=False)  # a run may be called by a dollar sign
    axes = figure.subplots(2, 2, sharex=True)
    colors = color_sequences["tab20"]
    for line, layers in zip(axes, (True, False), strict=True):
        shown = [row for row in rows if row.layer == layers]
        for number, row in enumerate(shown):
            style: dict[str, Any] = {
                "color": colors[number % len(colors)],
                "linestyle": ("-", "--", ":")[number // len(colors) % 3],
                "label": row.name if row.verdict == "flat" else f"{row.name}: {row.verdict}",
            }
            for ax, values in zip(line, (row.activations, row.updates), strict=True):
                ax.plot(list(values), list(values.values()), "o", markersize=3, **style)
        what = "layers" if layers else "matrices"
        for ax, measured in zip(line, ("output", "change of the output by training"), strict=True):
            ax.set(xscale="log", yscale="log", title=f"{what}: {measured}, root mean square")
            ax.grid(alpha=0.3, which="both")
        line[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    widths = list(rows[0].activations)
    for ax in axes[1]:
        ax.set(xlabel="model.hidden_size", xticks=widths, xticklabels=[str(w) for w in widths])
        ax.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_figure(path, figure, dpi=110)
