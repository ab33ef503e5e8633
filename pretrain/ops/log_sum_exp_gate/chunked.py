"""The log-sum-exp gate, parallel over chunks of time."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_log_sum_exp(
    x: Tensor, initial_state: Tensor, sequences: Sequences, chunk_size: int
) -> tuple[Tensor, Tensor]:
    """Compute ``x_t - z_{t-1}`` as sums over chunks, then over their ends.

    Shapes are those of
    :func:`pretrain.ops.log_sum_exp_gate.definition.recurrent_log_sum_exp`. No sum is a difference
    of longer ones, so that a small logit after large ones, or in the next document, is exact.
    """
    layout = sequences.chunk_layout(chunk_size)
    chunks = to_chunks(x.flatten(1), layout, head_axis=2)  # [n, H K, C]
    if layout.padded:
        padding = layout.token_index == len(x)
        chunks = chunks.masked_fill(padding[:, None], -torch.inf)
    within = torch.logcumsumexp(chunks, -1)
    # Sequences that end drop out of the steps: they are the last, see ChunkLayout.
    z = initial_state.flatten(1)[layout.order]
    starts, ended = [z[:0]], []
    for first, count in layout.steps:
        ended.append(z[count:])
        z = z[:count]
        starts.append(z)
        z = torch.logaddexp(z, within[first : first + count, :, -1])
    last = torch.cat([z, *reversed(ended)])[torch.argsort(layout.order)]
    start = torch.cat(starts)[..., None]
    earlier = torch.cat([start, torch.logaddexp(start, within[..., :-1])], -1)
    differences = from_chunks((chunks - earlier)[..., None], layout).view(x.shape)
    return differences, last.view(initial_state.shape)
