"""The diagonal recurrence's definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def sequential_diagonal_scan(
    a: Tensor, x: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence by its definition, one token after another.

    a, x ``[T, D]`` and initial_state ``[N, D]`` of one dtype. Returns all states ``[T, D]`` and the
    last ``[N, D]``.
    """
    decays, inputs = a.unbind(0), x.unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            state = decays[t] * state + inputs[t]
            outputs.append(state)
        states.append(state)
    output = torch.stack(outputs) if outputs else x.new_zeros(x.shape)
    return output, torch.stack(states) if states else initial_state
