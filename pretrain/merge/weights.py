"""The weights of checkpoints in a merge.

``inverse-decay`` is what a decay would have made of the same updates. The trunk's updates u_s, from
step a to step b at a constant rate, lead from the weights x_a to x_b = x_a + sum of u_s. A decay
makes each of them smaller by its share r_s of the rate: x = x_a + sum of r_s u_s. With
u_s = x_(s+1) - x_s that is a weighted average of the weights on the way (summation by parts):

    x = (1 - r_a) x_a + sum over s of (r_(s-1) - r_s) x_s + r_(b-1) x_b

Where only some steps were saved, the updates between two of them are known as a sum. With the
mean share R_j of those from checkpoint j - 1 to checkpoint j of n, the weights are 1 - R_1,
R_j - R_(j+1) and R_n: a decay in stairs, exact where the updates between two checkpoints are alike.
They sum to 1, and none is negative. A real decay differs in its updates: their gradients are those
of other weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pretrain.common.errors import UserError
from pretrain.config.schedule import Decay, ScheduleConfig, learning_rate

RULES = ("mean", "linear", "inverse-decay")


def weights_of(
    rule: str, steps: Sequence[int], decay: Decay = "linear", final_ratio: float = 0.0
) -> NDArray[np.float64]:
    """Return the weight of the checkpoint of each step, ascending; they sum to 1.

    ``mean``: equal ones; ``linear``: rising in proportion to 1, 2, ..., up to the last;
    ``inverse-decay``: those of a decay of the shape ``decay`` to ``final_ratio`` of the rate that
    begins at the first step and ends at the last.
    """
    count = len(steps)
    if rule == "mean":
        return np.full(count, 1 / count)
    if rule == "linear":
        return np.arange(1, count + 1) / (count * (count + 1) / 2)
    shares = decay_shares(steps[-1] - steps[0], decay, final_ratio)
    before = np.cumsum([0.0, *shares])[np.asarray(steps) - steps[0]]
    means = np.diff(before) / np.diff(steps)
    return np.concatenate([[1.0], means]) - np.concatenate([means, [0.0]])


def decay_shares(length: int, decay: Decay, final_ratio: float) -> NDArray[np.float64]:
    """Return the learning rate of each of ``length`` steps of a decay, as a share of the peak.

    As training computes it for ``schedule.kind: wsd``.
    """
    schedule = ScheduleConfig("wsd", 0, decay, 1.0, final_ratio)
    return np.array([learning_rate(schedule, 1.0, step, length) for step in range(length)])


def check_constant(rates: Sequence[float], first: int, last: int) -> None:
    """Raise UserError unless the rates of the steps from ``first`` to ``last`` are equal."""
    window = rates[first:last]
    if max(window) > min(window) * (1 + 1e-9):
        raise UserError(
            f"--weights inverse-decay: the learning rate goes from {max(window):.3g} to "
            f"{min(window):.3g} between steps {first} and {last}, expected a constant one; take "
            "other --steps, or --weights mean"
        )
