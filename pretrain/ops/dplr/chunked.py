"""Diagonal plus low rank, parallel over chunks of time, with a backward pass written by hand.

With G the running sum of log-decays inside a chunk, G- that before each token, S the state that the
chunk starts from, and pairs of tokens j <= i (j < i for e) times ``exp`` of the decay between them:

    A = stril(e P^T e^{G- - G}),  T = (I - A)^-1,  W = T (e^{G-} e),  B = stril(e K^T e^{G- - G})
    U = W S + T B V                   what the erase keys read
    O = (e^G q) S + tril(q K^T e^{G - G}) V + tril(q P^T e^{G - G}) U
    S' = e^{G_C} S + (e^{G_C - G} k)^T V + (e^{G_C - G} p)^T U

Erase keys read the state of the token before: as the later side of pairs, e_{i+1} stands in row i.
Backward, with X = T^T dU:  dA = X U^T, dB = X V^T, d(e^{G-} e) = X S^T; the gradients of G follow
from the products of q, k, e and p with their own gradients.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.dplr.one_key import one_key_dplr
from pretrain.ops.shared.chunk_decay import (
    chunk_decay,
    chunk_tokens,
    rows_after,
    rows_before,
)
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    write: Tensor | None,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence parallel over chunks of about ``chunk_size`` tokens.

    Shapes are those of :func:`pretrain.ops.dplr.definition.recurrent_dplr`.
    """
    per_channel = log_decay is not None and log_decay.ndim == 3
    layout = sequences.chunk_layout(chunk_tokens(chunk_size, 1, sequences.max_length, per_channel))
    q, k, v, erase = (to_chunks(x, layout, head_axis=2) for x in (q, k, v, erase))
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:-1])
    else:
        log_decay = to_chunks(log_decay, layout, head_axis=2)
    start = initial_state[layout.order]
    if write is None:
        output, state = one_key_dplr(q, k, v, erase, log_decay, start, layout.steps)
    else:
        write = to_chunks(write, layout, head_axis=2)
        output, state = _ChunkedDPLR.apply(q, k, v, erase, write, log_decay, start, layout.steps)
    return from_chunks(output, layout), state[torch.argsort(layout.order)]


class _ChunkedDPLR(torch.autograd.Function):
    """The recurrence over chunks as one differentiable function.

    Shapes: q, k, erase, write [n, H, C, K], v [n, H, C, V], log_decay [n, H, C] or [n, H, C, K],
    initial_state [N, H, K, V] in the layout's order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        erase: Tensor,
        write: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        steps: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        decay = chunk_decay(log_decay, 1)
        following = rows_after(erase)
        erase_keys = rows_before(decay.pairs(following, k))
        a = rows_before(decay.pairs(following, write)).neg_()
        # The solver reads below the diagonal only.
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        t = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        w = t @ (rows_before(decay.to_query, 1.0) * erase)
        reads = t @ (erase_keys @ v)
        write_end = decay.to_end * write

        states = (decay.to_end * k).mT @ v  # what each chunk adds; then what it starts from
        state = initial_state.clone()
        for first, count in steps:
            chunk = slice(first, first + count)
            added = states[chunk].clone()
            states[chunk] = state[:count]
            reads[chunk] += w[chunk] @ states[chunk]
            state[:count] *= decay.over_chunk[chunk]
            state[:count] += added
            state[:count] += write_end[chunk].mT @ reads[chunk]
        keys, writes = decay.pairs(q, k), decay.pairs(q, write)
        output = (decay.to_query * q) @ states
        output += keys @ v
        output += writes @ reads
        ctx.save_for_backward(
            q, k, v, erase, write, log_decay, t, w, reads, states, erase_keys, keys, writes
        )
        ctx.steps = steps
        return output, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, erase, write, log_decay, t, w, reads, states, *pairs = ctx.saved_tensors
        erase_keys, keys, writes = pairs
        decay = chunk_decay(log_decay, 1)
        write_end = decay.to_end * write

        d_reads = writes.mT @ d_output
        d_next = (decay.to_query * q).mT @ d_output  # becomes the gradient of each chunk's end
        d_state = d_state.clone()
        for first, count in reversed(ctx.steps):
            chunk = slice(first, first + count)
            d_start = d_next[chunk].clone()
            d_next[chunk] = d_state[:count]
            d_reads[chunk] += write_end[chunk] @ d_next[chunk]
            d_state[:count] *= decay.over_chunk[chunk]
            d_state[:count] += d_start
            d_state[:count] += w[chunk].mT @ d_reads[chunk]

        x = t.mT @ d_reads
        dv = keys.mT @ d_output
        dv += (decay.to_end * k) @ d_next
        dv += erase_keys.mT @ x

        following, d_before = rows_after(erase), rows_after(x)
        dq, dk = decay.pairs_backward(d_output @ v.mT, q, k)
        dq_write, d_write = decay.pairs_backward(d_output @ reads.mT, q, write)
        d_erase, dk_erase = decay.pairs_backward(d_before @ v.mT, following, k)
        d_erase_write, d_write_erase = decay.pairs_backward(d_before @ reads.mT, following, write)
        dq += dq_write
        dq += decay.to_query * (d_output @ states.mT)
        d_erase = rows_before(d_erase + d_erase_write)
        d_erase += rows_before(decay.to_query, 1.0) * (x @ states.mT)
        dk_end, d_write_end = decay.to_end * (v @ d_next.mT), decay.to_end * (reads @ d_next.mT)
        dk += dk_erase
        dk += dk_end
        d_write += d_write_erase
        d_write += d_write_end

        d_log_decay = None
        if ctx.needs_input_grad[5]:
            d_total = q * dq - k * dk - write * d_write
            d_total += rows_after(erase * d_erase)
            d_total[:, :, -1] += (k * dk_end + write * d_write_end).sum(2)
            d_total[:, :, -1] += (decay.over_chunk * states * d_next).sum(-1)
            d_log_decay = decay.reduce(d_total).flip(2).cumsum(2).flip(2)
        return dq, dk, dv, d_erase, d_write, d_log_decay, d_state, None
