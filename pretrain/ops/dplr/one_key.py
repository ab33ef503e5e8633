"""Diagonal plus low rank where values and what was erased are written at one key, over chunks.

What is written at a token's key is N = V + e S, as in a delta rule with an erase key of its own.
Half of the pairs of :mod:`pretrain.ops.dplr.chunked` are needed, and in its notation:

    A = stril(e K^T e^{G- - G}),  T = (I - A)^-1,  N = T V + T (e^{G-} e) S
    O = (e^G q) S + tril(q K^T e^{G - G}) N,  S' = e^{G_C} S + (e^{G_C - G} k)^T N

Backward, with X = T^T dN:  dA = X N^T, dV = X, d(e^{G-} e) = X S^T.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.shared.chunk_decay import chunk_decay, rows_after, rows_before


def one_key_dplr(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    erase: Tensor,
    log_decay: Tensor,
    initial_state: Tensor,
    steps: list[tuple[int, int]],
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence of chunks ``[n, H, C, ...]`` that follow each other by ``steps``.

    The states are in the layout's order.
    """
    result: tuple[Tensor, Tensor] = _OneKey.apply(q, k, v, erase, log_decay, initial_state, steps)
    return result


class _OneKey(torch.autograd.Function):
    """The recurrence over chunks as one differentiable function.

    Shapes: q, k, erase [n, H, C, K], v [n, H, C, V], log_decay [n, H, C] or [n, H, C, K],
    initial_state [N, H, K, V] in the layout's order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        erase: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        steps: list[tuple[int, int]],
    ) -> tuple[Tensor, Tensor]:
        decay = chunk_decay(log_decay, 1)
        a = rows_before(decay.pairs(rows_after(erase), k)).neg_()
        # The solver reads below the diagonal only.
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        t = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        w = t @ (rows_before(decay.to_query, 1.0) * erase)
        written = t @ v
        k_end = decay.to_end * k

        state = initial_state.clone()
        states = k.new_empty(k.shape[0], *state.shape[1:])
        for first, count in steps:
            chunk = slice(first, first + count)
            states[chunk] = state[:count]
            written[chunk] += w[chunk] @ states[chunk]
            state[:count] *= decay.over_chunk[chunk]
            state[:count] += k_end[chunk].mT @ written[chunk]
        pairs = decay.pairs(q, k)
        output = (decay.to_query * q) @ states
        output += pairs @ written
        ctx.save_for_backward(q, k, erase, log_decay, t, w, written, states, pairs)
        ctx.steps = steps
        return output, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, erase, log_decay, t, w, written, states, pairs = ctx.saved_tensors
        decay = chunk_decay(log_decay, 1)
        k_end = decay.to_end * k

        d_written = pairs.mT @ d_output
        d_next = (decay.to_query * q).mT @ d_output  # becomes the gradient of each chunk's end
        d_state = d_state.clone()
        for first, count in reversed(ctx.steps):
            chunk = slice(first, first + count)
            d_start = d_next[chunk].clone()
            d_next[chunk] = d_state[:count]
            d_written[chunk] += k_end[chunk] @ d_next[chunk]
            d_state[:count] *= decay.over_chunk[chunk]
            d_state[:count] += d_start
            d_state[:count] += w[chunk].mT @ d_written[chunk]

        dv = t.mT @ d_written
        dq, dk = decay.pairs_backward(d_output @ written.mT, q, k)
        dq += decay.to_query * (d_output @ states.mT)
        d_following, dk_erase = decay.pairs_backward(
            rows_after(dv) @ written.mT, rows_after(erase), k
        )
        d_erase = rows_before(d_following)
        d_erase += rows_before(decay.to_query, 1.0) * (dv @ states.mT)
        dk_end = decay.to_end * (written @ d_next.mT)
        dk += dk_erase
        dk += dk_end

        d_log_decay = None
        if ctx.needs_input_grad[4]:
            d_total = q * dq - k * dk
            d_total += rows_after(erase * d_erase)
            d_total[:, :, -1] += (k * dk_end).sum(2)
            d_total[:, :, -1] += (decay.over_chunk * states * d_next).sum(-1)
            d_log_decay = decay.reduce(d_total).flip(2).cumsum(2).flip(2)
        return dq, dk, dv, d_erase, d_log_decay, d_state, None
