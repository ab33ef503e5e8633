"""pLSTM with J = 1, as linear attention over inputs that are one token late."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.linear_attention.dispatch import linear_attention
from pretrain.ops.plstm.definition import Gates

_LEAST = 1e-30  # of a decay, whose logarithm must be finite


def shifted_plstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Gates,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute pLSTM of one part by linear attention.

    Shapes are those of :func:`pretrain.ops.plstm.definition.recurrent_plstm`, J = 1. A decay's
    sign, multiplied up over a sequence, goes into keys and queries.
    """
    owners, first, last, start = sequences.derive(_places)
    source, decay, mark, direct = (gate[..., 0] for gate in gates)  # [T, H, 1]
    flips = (decay < 0).long().cumsum(0)
    flips = flips - torch.cat([torch.zeros_like(flips[:1]), flips]).index_select(0, start)
    signs = (1 - 2 * (flips % 2)).to(q.dtype)
    written = source * k
    began = torch.zeros(len(q), 1, 1, dtype=torch.bool, device=q.device)
    began[first] = True

    def late(x: Tensor, at_start: float) -> Tensor:
        earlier = torch.cat([x[:1], x[:-1]])
        return earlier.masked_fill(began, at_start)

    before = late(signs, 1.0)
    read, states = linear_attention(
        (before * q)[None],
        late(signs * written, 0.0)[None],
        late(v[:, :, 0], 0.0)[None],
        log_decay=late(decay.abs().clamp_min(_LEAST).log(), 0.0)[None, ..., 0],
        scale=1.0,
        initial_state=initial_state.flatten(3),
        sequences=sequences,
        chunk_size=chunk_size,
    )
    output = mark * read[0] + direct * (q * k).sum(-1, keepdim=True) * v[:, :, 0]
    # The states are those before the last tokens are written.
    ends = torch.einsum("nhk,nhp->nhkp", written[last], v[last, :, 0])
    ends = ends + (decay * before)[last][..., None] * states[owners]
    states = states.index_copy(0, owners, ends)
    return output[:, :, None], states[:, :, :, None]


def _places(sequences: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sequences that have tokens, their first and last ones, and each token's first."""
    lengths = torch.tensor(sequences.lengths, dtype=torch.int64)
    ends, device = lengths.cumsum(0), sequences.device
    owners = lengths.nonzero()[:, 0]
    starts = torch.repeat_interleave(ends - lengths, lengths)
    places = (owners, (ends - lengths)[owners], ends[owners] - 1, starts)
    return places[0].to(device), places[1].to(device), places[2].to(device), places[3].to(device)
