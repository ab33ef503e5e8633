"""Linear recurrences of small blocks, solved in place: x_l = J_l x_{l-1} + r_l, elementwise over D.

Time is cut into chunks of m positions. Positions follow one another and all chunks advance side by
side, which is work-efficient: two passes over the data instead of log2 T. Tensors are laid out
``[S, m, n, D]`` (states, positions, chunks, channels), J ``[S, S, m, n, D]`` (to, from). Chunks are
ordered by step, longest sequence first; ``counts`` says how many chunks each step has.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def solve_forward(jacobian: Tensor, r: Tensor, counts: Sequence[int]) -> None:
    """Overwrite ``r`` with the solution that starts from zeros; ``jacobian`` is used up."""
    size = r.shape[0]
    positions, products = r.unbind(1), jacobian.unbind(2)
    for i in range(1, len(positions)):
        for s in range(size):
            positions[i].addcmul_(products[i][:, s], positions[i - 1][s])
        compose_(products[i], products[i], products[i - 1])
    # What enters each chunk is what left the chunk before it.
    entering = torch.zeros_like(positions[0])
    ends = positions[-1].split(counts, 1)
    maps = products[-1].split(counts, 2)
    enters = entering.split(counts, 1)
    for j in range(len(counts) - 1):
        n = counts[j + 1]
        if n == counts[j]:
            end, step, enter = ends[j], maps[j], enters[j]
        else:
            end, step, enter = ends[j][:, :n], maps[j][:, :, :n], enters[j][:, :n]
        leave = torch.addcmul(end, step[:, 0], enter[0], out=enters[j + 1])
        for s in range(1, size):
            leave.addcmul_(step[:, s], enter[s])
    for s in range(size):
        r.addcmul_(jacobian[:, s], entering[s])


def solve_backward(jacobian: Tensor, g: Tensor, counts: Sequence[int], incoming: Tensor) -> Tensor:
    """Overwrite ``g`` with the solution of x_l = g_l + J_{l+1}^T x_{l+1}; ``jacobian`` is used up.

    ``incoming`` ``[S, n_last, D]`` is what follows the last step's chunks. Returns
    J_1^T x_1 ``[S, n_first, D]`` for what precedes the first step's.
    """
    size = g.shape[0]
    positions, products = g.unbind(1), jacobian.unbind(2)
    last = len(positions) - 1
    for i in range(last - 1, -1, -1):
        for s in range(size):
            positions[i].addcmul_(products[i + 1][s], positions[i + 1][s])
        if i + 1 < last:
            compose_(products[i + 1], products[i + 2], products[i + 1])
    leaving = products[0][0] * positions[0][0]
    for s in range(1, size):
        leaving.addcmul_(products[0][s], positions[0][s])
    if last > 0:
        compose_(products[0], products[1], products[0])
    entering = torch.zeros_like(leaving)
    leaves, maps = leaving.split(counts, 1), products[0].split(counts, 2)
    enters = entering.split(counts, 1)
    enters[-1].copy_(incoming)
    for j in range(len(counts) - 1, -1, -1):
        for s in range(size):
            leaves[j].addcmul_(maps[j][s], enters[j][s])
        if j > 0:
            enters[j - 1][:, : counts[j]] = leaves[j]
    if last > 0:
        for s in range(size):
            g[:, :last].addcmul_(jacobian[s, :, 1:], entering[s])
    positions[last].add_(entering)
    return leaves[0]


def compose_(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Overwrite ``into`` with the product of two ``[S, S, n, D]``; it may be one of them."""
    if left.shape[0] == 1:
        torch.mul(left, right, out=into)
        return
    product = left[:, 0:1] * right[0:1]
    for s in range(1, left.shape[0]):
        product.addcmul_(left[:, s : s + 1], right[s : s + 1])
    into.copy_(product)
