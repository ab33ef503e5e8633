"""The delta rule's definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule by its definition, one token after another.

    q ``[T, H, K]``, already scaled; k ``[T, n, H, K]``; v ``[T, n, H, V]``; beta ``[T, n, H]``;
    log_decay None, ``[T, H]`` or ``[T, H, K]``; initial_state ``[N, H, K, V]``; all of one dtype.
    Returns the output ``[T, H, V]`` and the final states ``[N, H, K, V]``.
    """
    num_heads, value_dim = q.shape[1], v.shape[-1]
    # Unbinding once keeps the backward pass linear in T: indexing would add a full-size gradient
    # for every token.
    queries, keys, values, betas = q.unbind(0), k.unbind(0), v.unbind(0), beta.unbind(0)
    decays = None
    if log_decay is not None:
        decays = (log_decay[..., None] if log_decay.ndim == 2 else log_decay).exp().unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            if decays is not None:
                state = state * decays[t][..., None]
            for key, value, b in zip(keys[t], values[t], betas[t], strict=True):
                read = torch.einsum("hk,hkv->hv", key, state)
                write = b[:, None] * (value - read)
                state = state + key[:, :, None] * write[:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", queries[t], state))
        states.append(state)
    output = torch.stack(outputs) if outputs else q.new_zeros(0, num_heads, value_dim)
    return output, torch.stack(states) if states else initial_state
