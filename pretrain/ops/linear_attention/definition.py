"""Linear attention's definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Compute linear attention by its definition, one token after another.

    q ``[T, H, K]``, already scaled; k ``[T, H, K]``; v ``[T, H, V]``; log_decay None, ``[T, H]`` or
    ``[T, H, K]``; initial_state ``[N, H, K, V]``; all of one dtype. Returns the output
    ``[T, H, V]`` and the final states ``[N, H, K, V]``.
    """
    queries, keys, values = q.unbind(0), k.unbind(0), v.unbind(0)
    decays = None
    if log_decay is not None:
        decays = (log_decay[..., None] if log_decay.ndim == 2 else log_decay).exp().unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            if decays is not None:
                state = state * decays[t][..., None]
            state = state + keys[t][:, :, None] * values[t][:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", queries[t], state))
        states.append(state)
    output = torch.stack(outputs) if outputs else v.new_zeros(v.shape)
    return output, torch.stack(states) if states else initial_state
