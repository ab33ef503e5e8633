"""The definition of recurrences of diagonal plus low rank: a plain loop, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by its definition, one token after another.

    q ``[T, H, K]``, already scaled; k, erase and write ``[T, H, K]``, where no write means k; v
    ``[T, H, V]``; log_decay None, ``[T, H]`` or ``[T, H, K]``; initial_state ``[N, H, K, V]``; all
    of one dtype. Returns the output ``[T, H, V]`` and the final states ``[N, H, K, V]``.
    """
    # Unbinding once keeps the backward pass linear in T: indexing would add a full-size gradient
    # for every token.
    queries, keys, values, erases = (x.unbind(0) for x in (q, k, v, erase))
    writes = keys if write is None else write.unbind(0)
    decays = None
    if log_decay is not None:
        decays = (log_decay[..., None] if log_decay.ndim == 2 else log_decay).exp().unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            read = torch.einsum("hk,hkv->hv", erases[t], state)
            if decays is not None:
                state = state * decays[t][..., None]
            state = state + writes[t][:, :, None] * read[:, None, :]
            state = state + keys[t][:, :, None] * values[t][:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", queries[t], state))
        states.append(state)
    output = torch.stack(outputs) if outputs else torch.zeros_like(v)
    return output, torch.stack(states) if states else initial_state
