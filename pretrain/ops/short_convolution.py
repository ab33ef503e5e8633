"""Depthwise causal convolution over time that knows where sequences begin (LAYERS 1.1).

y_t = sum_j weight_j x_{t-W+1+j},  taps before a sequence's first token read its history or 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.arguments import resolve_sequences
from pretrain.ops.packing import remember, sequence_ids, sequence_lengths


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x ``[B, T, D]``, weight ``[D, W]``, bias ``[D]``; ``cu_seqlens`` packs N sequences (B = 1).

    ``initial_state`` ``[N, W - 1, D]`` holds the inputs before each sequence's first token, oldest
    first. Returns y ``[B, T, D]`` in x's dtype and the final state, the last W - 1 inputs of each
    sequence. Raises ValueError for shapes that do not fit.
    """
    batch_size, length, dim = x.shape
    history = weight.shape[1] - 1
    if weight.shape[0] != dim:
        raise ValueError(f"short_convolution: weight is {tuple(weight.shape)}, expected ({dim}, W)")
    if cu_seqlens is not None:
        resolve_sequences("short_convolution", batch_size, length, cu_seqlens, x.device)
    packed = cu_seqlens is not None and len(cu_seqlens) != 2
    num_sequences = batch_size if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = x.new_zeros(num_sequences, history, dim)
    elif tuple(initial_state.shape) != (num_sequences, history, dim):
        raise ValueError(
            f"short_convolution: initial_state is {tuple(initial_state.shape)}, "
            f"expected {(num_sequences, history, dim)}"
        )
    initial_state = initial_state.to(x.dtype)
    if not packed:
        extended = torch.cat([initial_state, x], 1)  # each row after its own history
        y = _Taps.apply(extended, weight)
        state = extended[:, length:].clone()  # not a view that holds the whole row
    else:
        assert cu_seqlens is not None
        flat = torch.cat([initial_state.flatten(0, 1), x[0]])
        gather, tokens, ends = _packed_index(cu_seqlens, history)
        extended = flat[gather][None]
        y = _Taps.apply(extended, weight)[:, tokens]
        state = extended[0, ends]
    return (y if bias is None else y + bias), state


@remember
def _packed_index(cu_seqlens: Tensor, history: int) -> tuple[Tensor, Tensor, Tensor]:
    """How to lay each sequence after its own history.

    Returns the gather index into (all histories, all tokens), the place of each token's output,
    and ``[N, history]`` places of the last inputs of each sequence.
    """
    lengths = cu_seqlens.diff().long()
    ids = sequence_ids(cu_seqlens)
    num_sequences, device = len(lengths), cu_seqlens.device
    total = sum(sequence_lengths(cu_seqlens))
    tokens = torch.arange(total, device=device) + history * ids  # output place of each token
    gather = torch.empty(total + history * num_sequences, dtype=torch.long, device=device)
    gather[tokens + history] = torch.arange(total, device=device) + history * num_sequences
    taps = torch.arange(history, device=device)
    starts = cu_seqlens[:-1].long() + history * torch.arange(num_sequences, device=device)
    gather[starts[:, None] + taps] = torch.arange(history * num_sequences, device=device).view(
        num_sequences, history
    )
    return gather, tokens, starts[:, None] + lengths[:, None] + taps


class _Taps(torch.autograd.Function):
    """extended [B, T + W - 1, D], weight [D, W] to [B, T, D], without W copies in backward."""

    @staticmethod
    def forward(ctx: Any, extended: Tensor, weight: Tensor) -> Tensor:
        width = weight.shape[1]
        length = extended.shape[1] - width + 1
        taps = weight.to(extended.dtype).t()
        y = extended[:, :length] * taps[0]
        for j in range(1, width):
            y.addcmul_(extended[:, j : j + length], taps[j])
        ctx.save_for_backward(extended, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        extended, weight = ctx.saved_tensors
        length, width = dy.shape[1], weight.shape[1]
        taps = weight.to(dy.dtype).t()
        d_extended = torch.zeros_like(extended)
        d_weight = []
        for j in range(width):
            d_extended[:, j : j + length].addcmul_(dy, taps[j])
            d_weight.append(torch.einsum("btd,btd->d", dy, extended[:, j : j + length]))
        return d_extended, torch.stack(d_weight, 1).to(weight.dtype)
