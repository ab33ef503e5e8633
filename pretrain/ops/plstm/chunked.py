"""pLSTM, parallel over chunks of time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.plstm.definition import Gates
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute pLSTM parallel over chunks.

    Shapes are those of :func:`pretrain.ops.plstm.definition.recurrent_plstm`. In a chunk of C
    tokens, token t reads token i's values by the matrix ``M_t T_{t-1} ... T_{i+1} S_i`` times
    ``q_t . k_i``. All of them take C small products, each of all chunks at once.
    """
    layout = sequences.chunk_layout(min(chunk_size, max(sequences.max_length, 1)))
    q, k, v, source, transition, mark, direct = (
        to_chunks(x, layout, head_axis=2) for x in (q, k, v, *gates)
    )
    length, size, width = v.shape[2:]
    if layout.padded:  # padding leaves the state as it is
        empty = (layout.token_index == len(layout.token_slot))[:, None, :, None, None]
        eye = torch.eye(size, dtype=v.dtype, device=v.device)
        transition = torch.where(empty, eye, transition)
    products, to_end = _products(source, transition, mark)
    weights = products[..., size:].unflatten(-1, (length, size))  # [n, H, t, J, i, J]
    pairs = (q @ k.mT)[:, :, :, None, :, None] * weights
    values = v.flatten(2, 3)  # [n, H, C J, P]
    output = (pairs.flatten(4, 5).flatten(2, 3) @ values).unflatten(2, (length, size))
    output = output + (q * k).sum(-1)[..., None, None] * (direct @ v)

    written = (to_end[..., size:].unflatten(-1, (length, size)).transpose(2, 3) @ v).flatten(3)
    added = (k.mT @ written).unflatten(-1, (size, width))
    kept = to_end[:, :, None, :, :size, None]  # of the state, [n, H, 1, J, J, 1]
    state, starts = initial_state[layout.order], []
    for first, count in layout.steps:
        chunk = slice(first, first + count)
        starts.append(state[:count])
        new = (kept[chunk] * state[:count, :, :, None]).sum(4) + added[chunk]
        state = torch.cat([new, state[count:]])
    if starts:
        read = (q @ torch.cat(starts).flatten(3)).unflatten(-1, (size, width))
        output = output + products[..., :size] @ read
    found = from_chunks(output.flatten(3), layout).unflatten(-1, (size, width))
    return found, state[torch.argsort(layout.order)]


def _products(source: Tensor, transition: Tensor, mark: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each token reads, and what the chunk's end keeps, of its start and its tokens.

    The first is ``[n, H, C, J, J (1 + C)]``, ``M_t T_{t-1} ... T_1`` and then for each i ``M_t
    T_{t-1} ... T_{i+1} S_i``, zeros where i is not before t; the second ``[n, H, J, J (1 + C)]``,
    the same after the last token without M.
    """
    length, size = source.shape[2], source.shape[-1]
    so_far = torch.eye(size, dtype=source.dtype, device=source.device)
    so_far = so_far.expand(*source.shape[:2], size, size)
    read = []
    for t in range(length):
        read.append(F.pad(mark[:, :, t] @ so_far, (0, size * (length - t))))
        so_far = torch.cat([transition[:, :, t] @ so_far, source[:, :, t]], -1)
    return torch.stack(read, 2), so_far
