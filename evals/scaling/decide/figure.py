"""A picture of a decision: the arms' differences by compute, and what was believed at what cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.decide import Posterior

PICTURE = "beliefs.png"


def draw(
    directory: Path, rows: Sequence[Mapping[str, Any]], posterior: Posterior | None, total: float
) -> None:
    """Write the picture of all steps so far."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    told = [row for row in rows if "best" in row]
    arms = sorted(told[-1]["best"]) if told else []
    for index, arm in enumerate(arms):
        color = f"C{index}"
        spent = [row["spent"] / total for row in told if arm in row["best"]]
        chance = [row["best"][arm] for row in told if arm in row["best"]]
        right.plot(spent, chance, marker="o", label=arm, color=color)
        if posterior is not None:
            _arm(left, posterior, arm, color)
    left.set(xlabel="share of the target's compute", ylabel="u (log of the compute it is worth)")
    left.set_xscale("log")
    right.set(xlabel="spent, share of the target runs", ylabel="P(best)", ylim=(-0.02, 1.02))
    if arms:
        right.legend()
    figure.savefig(directory / PICTURE, dpi=110)


def _arm(axes: Any, posterior: Posterior, arm: str, color: str) -> None:
    seen = posterior.observations
    index, target = seen.arms.index(arm), seen.targets[arm]
    shares = np.array([6 * n * d / target.compute for n, d in seen.cells])
    known = seen.count[index] > 0
    axes.plot(shares[known], seen.u[index][known], "o-", color=color, label=arm)
    others = posterior.mean.mean(1)
    mean = float(posterior.weights @ (posterior.mean[:, index] - others))
    spread = posterior.mean[:, index] - others - mean
    count = len(seen.arms)
    mixing = np.full(count, -1.0 / count)
    mixing[index] += 1
    within = np.einsum("i,sij,j->s", mixing, posterior.covariance, mixing)
    sd = float(np.sqrt(posterior.weights @ (within + spread**2)))
    axes.errorbar([1.0], [mean], yerr=[1.96 * sd], fmt="s", color=color, capsize=3)
