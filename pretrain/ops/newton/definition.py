"""The definition of an elementwise recurrence: a plain loop over time, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.newton.cell import ElementwiseCell


def sequential_recurrence(
    cell: ElementwiseCell, x: Tensor, parameters: Tensor, state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by its definition, step after step, all sequences side by side.

    x ``[T, G, D]``, parameters ``[P, D]``, state ``[N, S, D]``; returns all states ``[T, S, D]``
    and the last ``[N, S, D]``.
    """
    layout = sequences.chunk_layout(1)
    counts = [count for _, count in layout.steps]
    inputs = x[layout.token_index[:, 0]].transpose(0, 1).split(counts, 1)
    h = state[layout.order].transpose(0, 1)
    states, ended = [], []
    for inner, count in zip(inputs, counts, strict=True):
        if count < h.shape[1]:
            ended.append(h[:, count:])
            h = h[:, :count]
        h = cell.step(h, inner, parameters)
        states.append(h)
    last = torch.cat([h, *reversed(ended)], 1).transpose(0, 1)[torch.argsort(layout.order)]
    if not states:
        return x.new_zeros(0, *state.shape[1:]), last
    return torch.cat(states, 1).transpose(0, 1)[layout.token_slot], last
