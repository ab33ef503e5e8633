"""Linear attention with decay: linear attention, RetNet, Mamba-2 (SSD), GLA, HGRN2.

    S_t = Diag(a_t) S_{t-1} + k_t^T v_t;         o_t = scale * q_t S_t

The decay a_t is absent, one number per head, or one per key channel. Sources: linear attention
arXiv 2006.16236, RetNet arXiv 2307.08621, GLA arXiv 2312.06635, Mamba-2 arXiv 2405.21060, HGRN2
arXiv 2404.07904.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import chunk_layout, max_length
from pretrain.ops.shared.arguments import (
    check_heads,
    check_shapes,
    choose_backend,
    decay_shape,
    resolve_sequences,
    resolve_state,
    sequence_rows,
)
from pretrain.ops.shared.chunk_decay import chunk_decay, chunk_tokens
from pretrain.ops.shared.chunking import from_chunks, to_chunks
from pretrain.ops.shared.flash_linear_attention import check_fla, fla_fits, fla_linear_attention

BACKENDS = ("auto", "recurrent", "chunked", "fla")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Linear recurrence over a matrix state.

    q, k: ``[B, T, H, K]``; v: ``[B, T, H, V]``; log_decay: None, ``[B, T, H]`` or
    ``[B, T, H, K]``, at most 0. ``scale`` defaults to K^-1/2. With ``cu_seqlens`` (``[N + 1]``) B
    must be 1 and N sequences are packed along T; ``initial_state`` is then ``[N, H, K, V]``,
    otherwise ``[B, H, K, V]``.

    backend: ``recurrent`` is the definition, a plain loop; ``chunked`` is parallel over chunks of
    ``chunk_size`` tokens (rounded up to a power of two for decays per channel); ``fla`` is
    flash-linear-attention's kernel (bfloat16 and float16). ``auto`` takes ``fla`` on CUDA where it
    can, ``chunked`` elsewhere, ``recurrent`` where every sequence is a single token.

    Returns the output ``[B, T, H, V]`` in q's dtype and the final state, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    check_heads("linear_attention", q, v)
    if chunk_size < 1:
        raise ValueError(f"linear_attention: chunk_size is {chunk_size}, expected at least 1")
    batch_size, length, num_heads, head_dim = q.shape
    value_dim, packed = v.shape[-1], cu_seqlens
    check_shapes(
        "linear_attention",
        {
            "k": (k, q.shape),
            "v": (v, (*q.shape[:3], value_dim)),
            "log_decay": (log_decay, decay_shape(q, log_decay)),
        },
    )
    cu_seqlens, lengths = resolve_sequences(
        "linear_attention", batch_size, length, cu_seqlens, q.device
    )
    initial_state = resolve_state(
        "linear_attention",
        initial_state,
        (len(lengths), num_heads, head_dim, value_dim),
        q,
        "sequences, heads, key dim, value dim",
    )
    dtype = initial_state.dtype
    scale = head_dim**-0.5 if scale is None else scale
    fast = "fla" if fla_fits(q) else "chunked"
    if max(lengths, default=0) <= 1:
        fast = "recurrent"
    backend = choose_backend("linear_attention", backend, BACKENDS, "recurrent", fast)
    if backend == "fla":
        check_fla("linear_attention", q)
        return fla_linear_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            None if log_decay is None else log_decay.to(dtype),
            scale,
            initial_state,
            packed,
        )
    arguments = (
        q.flatten(0, 1).to(dtype) * scale,
        k.flatten(0, 1).to(dtype),
        v.flatten(0, 1).to(dtype),
        None if log_decay is None else log_decay.flatten(0, 1).to(dtype),
        initial_state,
    )
    if backend == "recurrent":
        output, state = recurrent_linear_attention(*arguments, lengths)
    else:
        output, state = chunked_linear_attention(*arguments, cu_seqlens, chunk_size)
    return output.to(q.dtype).view(batch_size, length, num_heads, value_dim), state


def recurrent_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    lengths: list[int],
) -> tuple[Tensor, Tensor]:
    """The definition: one token after another. q ``[T, H, K]`` is scaled."""
    queries, keys, values = q.unbind(0), k.unbind(0), v.unbind(0)
    decays = None
    if log_decay is not None:
        decays = (log_decay[..., None] if log_decay.ndim == 2 else log_decay).exp().unbind(0)
    outputs, states = [], []
    for rows, state in zip(sequence_rows(lengths), initial_state, strict=True):
        for t in rows:
            if decays is not None:
                state = state * decays[t][..., None]
            state = state + keys[t][:, :, None] * values[t][:, None, :]
            outputs.append(torch.einsum("hk,hkv->hv", queries[t], state))
        states.append(state)
    output = torch.stack(outputs) if outputs else v.new_zeros(v.shape)
    return output, torch.stack(states) if states else initial_state


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """The same, parallel over chunks; shapes as in :func:`recurrent_linear_attention`."""
    per_channel = log_decay is not None and log_decay.ndim == 3
    layout = chunk_layout(
        cu_seqlens, chunk_tokens(chunk_size, 1, max_length(cu_seqlens), per_channel)
    )
    q, k, v = (to_chunks(x, layout, head_axis=2) for x in (q, k, v))
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:-1])
    else:
        log_decay = to_chunks(log_decay, layout, head_axis=2)
    output, state = _ChunkedLinearAttention.apply(
        q, k, v, log_decay, initial_state[layout.order], layout.steps
    )
    return from_chunks(output, layout), state[torch.argsort(layout.order)]


class _ChunkedLinearAttention(torch.autograd.Function):
    """With S a chunk's starting state, g = exp G from its start, P = pairs(q, k):

        O = (g q) S + P v;         S' = g_C S + (g_C / g k)^T v

    q, k [n, H, C, K], v [n, H, C, V], log_decay [n, H, C] or [n, H, C, K], initial_state
    [N, H, K, V] in the layout's order."""

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
        states = (decay.to_end * k).mT @ v  # what each chunk adds; then what it starts from
        state = initial_state.clone()
        for first, count in steps:
            chunk = slice(first, first + count)
            added = states[chunk].clone()
            states[chunk] = state[:count]
            state[:count] *= decay.whole[chunk]
            state[:count] += added
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
            d_state[:count] *= decay.whole[chunk]
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
            d_total[:, :, -1] += decay.reduce((decay.whole * states * d_next).sum(-1))
            d_log_decay = d_total.flip(2).cumsum(2).flip(2)
        return dq, dk, dv, d_log_decay, d_state, None
