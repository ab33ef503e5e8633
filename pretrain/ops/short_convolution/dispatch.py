"""Depthwise causal convolution over time that knows where sequences begin.

y_t = sum_j weight_j x_{t-(W-1-j) dilation};  taps before a sequence's first token read its history,
or 0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences, pieces_alone
from pretrain.ops.across import crossing, halo
from pretrain.ops.shared.arguments import choose_backend, resolve_sequences
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_fits, fla_short_convolution
from pretrain.ops.shared.histories import after_histories
from pretrain.ops.shared.recomputation import recomputed

BACKENDS = ("auto", "taps", "fla")


@without_autocast
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    final_state: bool = True,
    dilation: int = 1,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Convolve every channel of x over time, causally.

    x ``[B, T, D]``, weight ``[D, W]``, bias ``[D]``; ``activation`` of the result: None or
    ``silu``; ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) are packed along T (B = 1).

    ``initial_state`` ``[N, (W - 1) dilation, D]`` holds the inputs before each sequence's first
    token, oldest first. dilation: tokens from tap to tap. backend: ``taps`` adds shifted copies;
    ``fla`` is flash-linear-attention's kernel (bfloat16 and float16, no dilation), which ``auto``
    takes on CUDA for more than one token a sequence.

    Returns y ``[B, T, D]`` in x's dtype and the final state, as many last inputs of each sequence,
    or None without ``final_state``: in training nobody reads it. Raises ValueError for shapes that
    do not fit and an unknown backend.
    """
    if activation not in (None, "silu"):
        raise ValueError(f"short_convolution: activation is '{activation}', expected silu or None")
    batch_size, length, dim = x.shape
    if dilation < 1:
        raise ValueError(f"short_convolution: dilation is {dilation}, expected at least 1")
    history = (weight.shape[1] - 1) * dilation
    if weight.shape[0] != dim:
        raise ValueError(f"short_convolution: weight is {tuple(weight.shape)}, expected ({dim}, W)")
    as_rows = sequences is None and cu_seqlens is None
    sequences = resolve_sequences(
        "short_convolution", batch_size, length, x.device, sequences, cu_seqlens
    )
    packed = None if as_rows else sequences
    num_sequences = sequences.count
    several = length > 1 and history > 0 and batch_size * length > num_sequences
    fast = "fla" if several and dilation == 1 and fla_fits(x[..., :1]) else "taps"
    backend = choose_backend("short_convolution", backend, BACKENDS, "taps", fast)
    given = initial_state
    if initial_state is None:
        initial_state = x.new_zeros(num_sequences, history, dim)
    elif tuple(initial_state.shape) != (num_sequences, history, dim):
        raise ValueError(
            f"short_convolution: initial_state is {tuple(initial_state.shape)}, "
            f"expected {(num_sequences, history, dim)}"
        )
    initial_state = initial_state.to(x.dtype)
    segment = crossing(sequences)
    if segment is not None and history:
        before, tokens = halo(sequences, x[0], history, initial_state[-1])
        x = tokens[None]
        if segment.continues[segment.rank]:
            given = initial_state = torch.cat([before[None], initial_state[1:]])
        sequences = packed = pieces_alone(sequences)
    if backend == "fla":
        check_fla("short_convolution", x[..., :1])
        if dilation > 1:
            raise ValueError(
                f"short_convolution: backend 'fla' has no dilation, found {dilation}, expected 1"
            )
        past = None if given is None else initial_state
        y = recomputed(fla_short_convolution, x, weight, bias, activation, past, packed)
        return y, _last_inputs(x, initial_state, packed) if final_state else None
    together = None if as_rows or num_sequences == 1 else sequences
    if together is not None and x.device.type == "cpu" and len(set(sequences.lengths)) == 1:
        x, together = x.view(num_sequences, -1, dim), None  # as rows they need no gathers
    y, state = recomputed(
        _taps, x, weight, bias, activation, initial_state, together, final_state, dilation
    )
    return y.view(batch_size, length, dim), state


def _taps(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor,
    packed: Sequences | None,
    final_state: bool,
    dilation: int,
) -> tuple[Tensor, Tensor | None]:
    """Return y and, if wanted, the final state; ``packed`` where several sequences share a row."""
    if packed is None:
        extended = torch.cat([initial_state, x], 1)  # each row after its own history
        y = _Taps.apply(extended, weight, dilation)
        # Not a view that holds the whole row.
        state = extended[:, x.shape[1] :].clone() if final_state else None
    else:
        flat = torch.cat([initial_state.flatten(0, 1), x[0]])
        gather, tokens, ends = packed.derive(after_histories, initial_state.shape[1])
        extended = flat.index_select(0, gather)[None]
        y = _Taps.apply(extended, weight, dilation).index_select(1, tokens)
        state = extended[0, ends] if final_state else None
    y = y if bias is None else y + bias
    return (F.silu(y) if activation else y), state


def _last_inputs(x: Tensor, initial_state: Tensor, packed: Sequences | None) -> Tensor:
    """Return the last W - 1 inputs of each sequence, those before its first token included."""
    num_sequences, history, _ = initial_state.shape
    if packed is None:
        return torch.cat([initial_state, x[:, -history:]], 1)[:, -history:]
    taps = torch.arange(history, device=x.device)
    lengths = packed.sizes.long()[:, None]
    position = lengths - history + taps  # in the sequence; before its start where negative
    inside = x[0, (packed.cu_seqlens[:-1].long()[:, None] + position).clamp(0, x.shape[1] - 1)]
    rows = torch.arange(num_sequences, device=x.device)[:, None]
    before = initial_state[rows, (position + history).clamp_max(history - 1)]
    return torch.where((position >= 0)[..., None], inside, before)


class _Taps(torch.autograd.Function):
    """Convolution of extended [B, T + (W - 1) dilation, D] by weight [D, W].

    The result is [B, T, D]; the backward pass makes no W copies.
    """

    @staticmethod
    def forward(ctx: Any, extended: Tensor, weight: Tensor, dilation: int) -> Tensor:
        width = weight.shape[1]
        length = extended.shape[1] - (width - 1) * dilation
        taps = weight.to(extended.dtype).t().contiguous()  # strided, each pass takes 8x as long
        y = extended[:, :length] * taps[0]
        for j in range(1, width):
            y.addcmul_(extended[:, j * dilation : j * dilation + length], taps[j])
        ctx.save_for_backward(extended, weight)
        ctx.dilation = dilation
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        extended, weight = ctx.saved_tensors
        length, width = dy.shape[1], weight.shape[1]
        taps = weight.to(dy.dtype).t().contiguous()
        d_extended = torch.zeros_like(extended)
        d_weight, product = [], torch.empty_like(dy)
        for j in range(width):
            span = slice(j * ctx.dilation, j * ctx.dilation + length)
            d_extended[:, span].addcmul_(dy, taps[j])
            torch.mul(dy, extended[:, span], out=product)
            d_weight.append(product.sum((0, 1)))
        return d_extended, torch.stack(d_weight, 1).to(weight.dtype), None
