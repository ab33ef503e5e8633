"""The log-sum-exp gate's definition: a plain loop over tokens, through autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.arguments import sequence_rows


def recurrent_log_sum_exp(
    x: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute ``x_t - z_{t-1}``, one token after another.

    x ``[T, H, K]`` and initial_state ``[N, H, K]``, z before the first tokens, of one dtype.
    Returns the differences ``[T, H, K]`` and the last z ``[N, H, K]``.
    """
    logits = x.unbind(0)
    differences, last = [], []
    for rows, z in zip(sequence_rows(sequences), initial_state, strict=True):
        for t in rows:
            differences.append(logits[t] - z)
            z = torch.logaddexp(z, logits[t])
        last.append(z)
    found = torch.stack(differences) if differences else x.new_zeros(x.shape)
    return found, torch.stack(last) if last else initial_state
