"""Pictures of a decision: the arms' differences by compute, and what was believed at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.decide.inference import Posterior
from pretrain.common.plots import plot_text

PICTURE = "beliefs.png"
_APART = 1.12  # between arms' intervals at the target, which would hide each other

Row = Mapping[str, Any]


def draw(directory: Path, rows: Sequence[Row], posterior: Posterior | None, total: float) -> None:
    """Write the picture of all steps so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_differences(left, rows, posterior)
    draw_beliefs(right, rows, total)
    figure.savefig(directory / PICTURE, dpi=110)


def draw_differences(axes: Any, rows: Sequence[Row], posterior: Posterior | None) -> None:
    """Draw u of each arm by compute, and 95 % of what is believed of it at the target."""
    axes.set(xlabel="share of the target's compute", ylabel="u (log of the compute it is worth)")
    if posterior is None:
        return
    axes.set_xscale("log")
    axes.axhline(0, color="0.8", linewidth=0.8)
    arms = _arms(rows)
    for index, arm in enumerate(arms):
        if arm in posterior.observations.arms:
            at = _APART ** (index - (len(arms) - 1) / 2)
            _arm(axes, posterior, arm, f"C{index}", at)
    axes.legend(fontsize=8)


def draw_beliefs(axes: Any, rows: Sequence[Row], total: float) -> None:
    """Draw P(best) of each arm by what was spent, of the arms' target runs."""
    told = [row for row in rows if "best" in row]
    for index, arm in enumerate(_arms(rows)):
        of_arm = [row for row in told if arm in row["best"]]
        axes.plot(
            [row["spent"] / total for row in of_arm],
            [row["best"][arm] for row in of_arm],
            marker="o",
            label=plot_text(arm, 40),
            color=f"C{index}",
        )
    axes.set(xlabel="spent, share of the target runs", ylabel="P(best)", ylim=(-0.02, 1.02))
    if told:
        axes.legend(fontsize=8)


def _arms(rows: Sequence[Row]) -> list[str]:
    """Return all arms that anything was believed of: one may have become unstable since."""
    return sorted({arm for row in rows for arm in row.get("best", {})})


def _arm(axes: Any, posterior: Posterior, arm: str, color: str, at: float) -> None:
    seen = posterior.observations
    index, target = seen.arms.index(arm), seen.targets[arm]
    shares = np.array([6 * n * d / target.compute for n, d in seen.cells])
    known = seen.count[index] > 0
    order = np.argsort(shares[known])
    axes.plot(
        shares[known][order],
        seen.u[index][known][order],
        "o-",
        color=color,
        label=plot_text(arm, 40),
    )
    others = posterior.mean.mean(1)
    mean = float(posterior.weights @ (posterior.mean[:, index] - others))
    spread = posterior.mean[:, index] - others - mean
    count = len(seen.arms)
    mixing = np.full(count, -1.0 / count)
    mixing[index] += 1
    within = np.einsum("i,sij,j->s", mixing, posterior.covariance, mixing)
    sd = float(np.sqrt(posterior.weights @ (within + spread**2)))
    axes.errorbar([at], [mean], yerr=[1.96 * sd], fmt="s", color=color, capsize=3)
