"""Packed sequences, each after what came before it: the last inputs that a state keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences


def after_histories(sequences: Sequences, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """Arrange each sequence after its history.

    Returns the gather index into (all histories, all tokens), the slot of each token's output, and
    ``[N, history]`` slots of the last inputs of each sequence.
    """
    lengths, ids, device = sequences.sizes.long(), sequences.ids, sequences.device
    num_sequences, total = sequences.count, sequences.num_tokens
    tokens = torch.arange(total, device=device) + history * ids  # output slot of each token
    gather = torch.empty(total + history * num_sequences, dtype=torch.long, device=device)
    gather[tokens + history] = torch.arange(total, device=device) + history * num_sequences
    taps = torch.arange(history, device=device)
    starts = sequences.cu_seqlens[:-1].long() + history * torch.arange(num_sequences, device=device)
    gather[starts[:, None] + taps] = torch.arange(history * num_sequences, device=device).view(
        num_sequences, history
    )
    return gather, tokens, starts[:, None] + lengths[:, None] + taps
