"""The definition of pLSTM: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows

Gates = tuple[Tensor, Tensor, Tensor, Tensor]


def recurrent_plstm(
    q: Tensor, k: Tensor, v: Tensor, gates: Gates, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute pLSTM by its definition, one token after another.

    q (scaled), k ``[T, H, K]``, v ``[T, H, J, P]``; gates: source, transition, mark and direct,
    each ``[T, H, J, J]``; initial_state ``[N, H, K, J, P]``; all of one dtype. Returns the output
    ``[T, H, J, P]`` and the final states.
    """
    tokens = [x.unbind(0) for x in (q, k, v, *gates)]
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            query, key, value, source, transition, mark, direct = (x[t] for x in tokens)
            read = mark @ torch.einsum("hk,hkjp->hjp", query, state)
            own = (query * key).sum(-1)[:, None, None] * (direct @ value)
            outputs.append(read + own)
            turned = torch.einsum("hij,hkjp->hkip", transition, state)
            state = turned + torch.einsum("hk,hjp->hkjp", key, source @ value)
        states.append(state)
    output = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return output, torch.stack(states) if states else initial_state
