"""The mesa layer's definition: a plain loop over tokens with a direct solve, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_mesa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    ridge: Tensor,
    initial_state: tuple[Tensor, Tensor],
    sequences: Sequences,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Compute the mesa layer by its definition; systems are solved in float64.

    q, k ``[T, H, K]``; v ``[T, H, V]``; beta and log_decay ``[T, H]``; ridge ``[H, K]``;
    initial_state ``[N, H, K, K]`` and ``[N, H, K, V]``; all of one dtype. Returns the output
    ``[T, H, V]`` and the last states.
    """
    regular = torch.diag_embed(ridge).double()
    outputs, covariances, states = [], [], []
    for rows, covariance, state in zip(sequence_rows(sequences), *initial_state, strict=True):
        for t in rows:
            decay = log_decay[t].exp()[:, None, None]
            write = (beta[t, :, None] * k[t])[..., None]
            covariance = decay * covariance + write * k[t][:, None]
            state = decay * state + write * v[t][:, None]
            solved = torch.linalg.solve(covariance.double() + regular, q[t].double())
            outputs.append(torch.einsum("hk,hkv->hv", solved.to(q.dtype), state))
        covariances.append(covariance)
        states.append(state)
    output = torch.stack(outputs) if outputs else v.new_zeros(v.shape)
    if not states:
        return output, initial_state
    return output, (torch.stack(covariances), torch.stack(states))
