"""Show a claim's measures and verdicts as a table and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from evals.scaling.figures import save
from evals.synthetic.claims.judging import Measures, Verdict, sentence
from evals.synthetic.claims.schema import Claim
from pretrain.common.plots import plot_text
from pretrain.common.screen import titled_table


def table_of(claim: Claim, found: Mapping[str, Mapping[int, Measures]]) -> Table:
    """Return a table of what the criteria name: a line per arm, seeds side by side."""
    table = titled_table(None, "arm", *claim.measures())
    for arm in claim.arms:
        cells = []
        for measure in claim.measures():
            values = [found[arm][seed].get(measure) for seed in claim.seeds]
            cells.append(" ".join("-" if v is None else f"{v:.3g}" for v in values))
        table.add_row(arm, *cells)
    table.caption = f"seeds {' '.join(map(str, claim.seeds))} side by side"
    return table


def verdict_line(verdict: Verdict) -> str:
    """Return a line on one criterion: whether it holds, and by what."""
    values = " ".join(f"{value:.4g}" for value in verdict.values)
    count = len(verdict.values)
    where = f"for {verdict.needed} of {count} seeds" if verdict.needed < count else ""
    word = "holds" if verdict.held else "FAILS"
    return f"{word}: {sentence(verdict.criterion)}{f' {where}' if where else ''} ({values})"


def draw(
    name: str,
    claim: Claim,
    found: Mapping[str, Mapping[int, Measures]],
    verdicts: Sequence[Verdict],
    path: Path,
) -> Path:
    """Draw every measure of every arm and seed, with the bounds of the criteria."""
    measures, arms = claim.measures(), list(claim.arms)
    size = (3.2 + 2.6 * len(measures), 1.6 + 0.45 * len(arms))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(measures), squeeze=False, sharey=True)[0]
    for axes, measure in zip(panels, measures, strict=True):
        for at, arm in enumerate(arms):
            values = [found[arm][seed].get(measure) for seed in claim.seeds]
            known = [v for v in values if v is not None]
            axes.plot(known, [at] * len(known), "o", color=f"C{at % 10}", alpha=0.7)
        for verdict in verdicts:
            bound = verdict.criterion
            plain = bound.minus_arm is None and bound.minus_measure is None
            if bound.measure == measure and plain:
                edge = bound.at_least if bound.at_least is not None else bound.at_most
                axes.plot([edge], [arms.index(bound.arm)], "|", color="black", markersize=16)
        axes.set(xlabel=plot_text(measure, 40))
        axes.set_yticks(range(len(arms)), [plot_text(arm, 50) for arm in arms])
    panels[0].set_ylim(len(arms) - 0.5, -0.5)
    held = "holds" if all(v.held for v in verdicts) else "does not hold"
    figure.suptitle(plot_text(f"{name}: {held}", 100), fontsize=10)
    return save(figure, path)
