"""The definitions of time-invariant systems: plain loops over tokens, through autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_lti(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute diagonal systems by their definition, one token after another.

    u ``[T, H]`` is real; a, b, c ``[H, M]`` and initial_state ``[N, H, M]`` are complex. Returns
    the output ``[T, H]`` and the final states ``[N, H, M]``.
    """
    return _loop(
        u,
        lambda x, now: a * x + b * now[:, None],
        lambda x: 2 * (c * x).real.sum(-1),
        initial_state,
        sequences,
    )


def recurrent_dense_lti(
    u: Tensor, a: Tensor, b: Tensor, c: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute systems of dense matrices by their definition, one token after another.

    u ``[T, H]``, a ``[H, S, S]``, b, c ``[H, S]``, initial_state ``[N, H, S]``, all real. Returns
    the output ``[T, H]`` and the final states ``[N, H, S]``.
    """
    return _loop(
        u,
        lambda x, now: torch.einsum("hij,hj->hi", a, x) + b * now[:, None],
        lambda x: (c * x).sum(-1),
        initial_state,
        sequences,
    )


def _loop(
    u: Tensor,
    step: Callable[[Tensor, Tensor], Tensor],
    read: Callable[[Tensor], Tensor],
    initial_state: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Tensor]:
    inputs = u.unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            state = step(state, inputs[t])
            outputs.append(read(state))
        states.append(state)
    output = torch.stack(outputs) if outputs else u.new_zeros(u.shape)
    return output, torch.stack(states) if states else initial_state
