"""Linear attention, parallel over chunks of time, with a backward pass written by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.shared.chunk_decay import ScalarDecay, VectorDecay, chunk_decay, chunk_tokens
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute linear attention parallel over chunks of about ``chunk_size`` tokens.

    Shapes are those of
    :func:`pretrain.ops.linear_attention.definition.recurrent_linear_attention`.
    """
    per_channel = log_decay is not None and log_decay.ndim == 3
    layout = sequences.chunk_layout(chunk_tokens(chunk_size, 1, sequences.max_length, per_channel))
    q, k, v = (to_chunks(x, layout, head_axis=2) for x in (q, k, v))
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:-1])
    else:
        log_decay = to_chunks(log_decay, layout, head_axis=2)
    output, state = _ChunkedLinearAttention.apply(
        q, k, v, log_decay, initial_state[layout.order], layout.steps
    )
    return from_chunks(output, layout), state[torch.argsort(layout.order)]


def chunk_starts(
    decay: ScalarDecay | VectorDecay,
    k: Tensor,
    v: Tensor,
    initial_state: Tensor,
    steps: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Return the state ``[n, H, K, V]`` that each chunk starts from, and the last ones.

    k ``[n, H, C, K]``, v ``[n, H, C, V]``, initial_state ``[N, H, K, V]`` in the layout's order.
    """
    states = (decay.to_end * k).mT @ v  # what each chunk adds; then what it starts from
    state = initial_state.clone()
    for first, count in steps:
        chunk = slice(first, first + count)
        added = states[chunk].clone()
        states[chunk] = state[:count]
        state[:count] *= decay.over_chunk[chunk]
        state[:count] += added
    return states, state


class _ChunkedLinearAttention(torch.autograd.Function):
    """The recurrence over chunks as one differentiable function.

    With S a chunk's starting state, g = exp G from its start, P = pairs(q, k):

        O = (g q) S + P v;         S' = g_C S + (g_C / g k)^T v

    q, k [n, H, C, K], v [n, H, C, V], log_decay [n, H, C] or [n, H, C, K], initial_state
    [N, H, K, V] in the layout's order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        steps: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        decay = chunk_decay(log_decay, 1)
        states, state = chunk_starts(decay, k, v, initial_state, steps)
        pairs = decay.pairs(q, k)
        output = (decay.to_query * q) @ states + pairs @ v
        ctx.save_for_backward(q, k, v, log_decay, states, pairs)
        ctx.steps = steps
        return output, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, states, pairs = ctx.saved_tensors
        decay = chunk_decay(log_decay, 1)
        d_next = (decay.to_query * q).mT @ d_output  # becomes the gradient of each chunk's end
        d_state = d_state.clone()
        for first, count in reversed(ctx.steps):
            chunk = slice(first, first + count)
            d_read = d_next[chunk].clone()
            d_next[chunk] = d_state[:count]
            d_state[:count] *= decay.over_chunk[chunk]
            d_state[:count] += d_read
        dv = pairs.mT @ d_output + (decay.to_end * k) @ d_next
        dq, dk = decay.pairs_backward(d_output @ v.mT, q, k)
        dq += decay.to_query * (d_output @ states.mT)
        dk_end = decay.to_end * (v @ d_next.mT)
        dk += dk_end
        d_log_decay = None
        if ctx.needs_input_grad[3]:
            d_total = decay.reduce(q * dq - k * dk)
            d_total[:, :, -1] += decay.reduce(k * dk_end).sum(2)
            d_total[:, :, -1] += decay.reduce((decay.over_chunk * states * d_next).sum(-1))
            d_log_decay = d_total.flip(2).cumsum(2).flip(2)
        return dq, dk, dv, d_log_decay, d_state, None
