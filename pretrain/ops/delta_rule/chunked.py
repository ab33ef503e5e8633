"""The delta rule, parallel over chunks of time, with a backward pass written by hand.

Inside a chunk of C sub-steps the product of Householder factors is resolved by the UT transform
(DeltaNet, arXiv 2406.06484, section 3); only the chunk-start states follow one another. With G the
running sum of log-decays inside the chunk, g = exp G, D_ij = exp(G_i - G_j) for i >= j:

    A = stril(diag(b) (K K^T * D)),  T = (I + A)^-1,  W = T (b g K),  U = T (b V)
    N = U - W S                       the values that are really written
    O = (g Q) S + P N,                P = tril(Q K^T * D)
    S' = g_C S + (g_C / g * K)^T N

Backward, with X = T^T dN:  dA = -stril(X N^T), dV = b X, d(b g K) = -X S^T; the gradients of G
follow from the products q*dq and k*dk. G is only ever used through differences that are <= 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.delta_rule.crossing_chunks import (
    CrossingChunks,
    at_once,
    crossing_chunks,
)
from pretrain.ops.shared.chunk_decay import chunk_decay, chunk_tokens
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Compute the delta rule parallel over chunks of about ``chunk_size`` sub-steps.

    Shapes are those of :func:`pretrain.ops.delta_rule.definition.recurrent_delta_rule`. The first
    sequence of a segment of a row goes on from the segment before.
    """
    per_channel = log_decay is not None and log_decay.ndim == 3
    tokens = chunk_tokens(chunk_size, k.shape[1], sequences.max_length, per_channel)
    layout = sequences.chunk_layout(tokens)
    q = to_chunks(q, layout, head_axis=2)
    k, v, beta = (to_chunks(x, layout, head_axis=3).flatten(2, 3) for x in (k, v, beta))
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:-1])
    else:
        log_decay = to_chunks(log_decay, layout, head_axis=2)
    crossing = sequences.derive(crossing_chunks, tokens)
    output, state = _ChunkedDeltaRule.apply(
        q, k, v, beta, log_decay, initial_state[layout.order], layout.steps, crossing
    )
    output = from_chunks(output, layout)
    return output, state[torch.argsort(layout.order)]


class _ChunkedDeltaRule(torch.autograd.Function):
    """The recurrence over chunks as one differentiable function.

    Shapes: q [n, H, Cq, K], k [n, H, C, K], v [n, H, C, V], beta [n, H, C], log_decay
    [n, H, Cq] or [n, H, Cq, K], initial_state [N, H, K, V] in the layout's order; n chunks of
    C = Cq * substeps.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        log_decay: Tensor,
        initial_state: Tensor,
        steps: list[tuple[int, int]],
        crossing: CrossingChunks | None,
    ) -> tuple[Tensor, Tensor]:
        decay = chunk_decay(log_decay, k.shape[2] // max(q.shape[2], 1))
        # Rows and columns are scaled in the C x C matrices, which are smaller than k and v.
        # The solver reads below the diagonal only.
        a = decay.pairs(k, k).mul_(beta[..., None])
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        t = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        t_beta = t * beta[..., None, :]
        written = t_beta @ v
        w = decay.from_start(t_beta, k)
        k_end = decay.to_end * k

        state = initial_state.clone()
        states = k.new_empty(k.shape[0], *state.shape[1:])

        def go(loop: Iterable[tuple[slice, slice]]) -> None:
            for chunk, row in loop:
                states[chunk] = state[row]
                written[chunk] -= w[chunk] @ states[chunk]
                state[row] *= decay.over_chunk[chunk]
                state[row] += k_end[chunk].mT @ written[chunk]

        passing = []
        if crossing is None:
            go(at_once(steps))
        else:
            go(crossing.before_entering)
            passing = [crossing.enter(decay, w, written, k_end, state)]
            go(crossing.from_what_entered)
            crossing.entered(state)
        pairs = decay.pairs(q, k)
        output = (decay.to_query * q) @ states + pairs @ written

        ctx.save_for_backward(q, k, v, beta, log_decay, t, w, written, states, pairs, *passing)
        ctx.steps, ctx.crossing = steps, crossing
        return output, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log_decay, t, w, written, states, pairs, *passing = ctx.saved_tensors
        crossing: CrossingChunks | None = ctx.crossing
        decay = chunk_decay(log_decay, k.shape[2] // max(q.shape[2], 1))
        beta = beta[..., None]
        k_end = decay.to_end * k

        d_written = pairs.mT @ d_output
        d_read = (decay.to_query * q).mT @ d_output
        d_state = d_state.clone()
        d_next = torch.empty_like(states)  # gradient of the state at each chunk's end

        def go_back(loop: Sequence[tuple[slice, slice]]) -> None:
            for chunk, row in reversed(loop):
                d_next[chunk] = d_state[row]
                d_written[chunk] += k_end[chunk] @ d_next[chunk]
                d_state[row] *= decay.over_chunk[chunk]
                d_state[row] += d_read[chunk] - w[chunk].mT @ d_written[chunk]

        if crossing is None:
            go_back(at_once(ctx.steps))
        else:
            go_back(crossing.not_handed_on)
            crossing.leave(decay, w, k_end, d_read, d_written, d_state, *passing)
            go_back(crossing.handed_on)
            crossing.left(d_state)

        x = t.mT @ d_written
        d_a = (x @ written.mT).tril_(-1).neg_()
        # A pairs beta k, on the later side, with k: ``row`` is the gradient of that beta k.
        row, earlier = decay.pairs_backward(d_a, beta * k, k)
        row -= decay.to_step * (x @ states.mT)
        dq, earlier_read = decay.pairs_backward(d_output @ written.mT, q, k)
        dq += decay.to_query * (d_output @ states.mT)
        dk_end = decay.to_end * (written @ d_next.mT)
        earlier += earlier_read
        earlier += dk_end  # where k stands on the earlier side
        dk = earlier + beta * row
        dv = beta * x
        d_beta = (x * v).sum(-1) + (row * k).sum(-1)

        d_log_decay = None
        if ctx.needs_input_grad[4]:
            d_total = decay.reduce(k * (beta * row - earlier))
            at_end = decay.reduce(k * dk_end).sum(2)
            at_end += decay.reduce((decay.over_chunk * states * d_next).sum(-1))
            d_total[:, :, -1] += at_end
            d_total = d_total.unflatten(2, (q.shape[2], -1)).sum(3) + decay.reduce(q * dq)
            d_log_decay = d_total.flip(2).cumsum(2).flip(2)
        return dq, dk, dv, d_beta, d_log_decay, d_state, None, None
