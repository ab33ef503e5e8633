"""M2RNN's definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows
from pretrain.ops.shared.gradient_clipping import clip_gradient


def recurrent_m2rnn(
    rows: Sequence[Tensor],
    weight: Tensor,
    initial_state: Tensor,
    sequences: Sequences,
    state_grad_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Compute M2RNN by its definition, one token after another.

    rows: q, k ``[T, Hx, K]``, v ``[T, H, V]``, forget ``[T, H]``; weight ``[H, V, V]``;
    initial_state ``[N, H, K, V]``; all of one dtype. Returns y ``[T, H, V]`` and the final states.
    """
    num_heads = weight.shape[0]
    q, k = (expand_heads(x, num_heads).unbind(0) for x in rows[:2])
    v, forget = (x.unbind(0) for x in rows[2:])
    outputs, states = [], []
    for tokens, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in tokens:
            z = torch.tanh(state @ weight + k[t][:, :, None] * v[t][:, None, :])
            f = forget[t][:, None, None]
            state = f * state + (1 - f) * z
            outputs.append(torch.einsum("hk,hkv->hv", q[t], state))
            state = clip_gradient(state, state_grad_clip)
        states.append(state)
    output = torch.stack(outputs) if outputs else rows[2].new_zeros(rows[2].shape)
    return output, torch.stack(states) if states else initial_state


def expand_heads(x: Tensor, num_heads: int) -> Tensor:
    """Repeat heads that several share: ``[R, Hx, K]`` to ``[R, H, K]``."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)
