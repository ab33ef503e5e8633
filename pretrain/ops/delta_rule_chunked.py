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

from typing import Any

import torch
from torch import Tensor

from pretrain.ops.packing import ChunkLayout, chunk_layout, max_length


def chunked_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """q ``[T, H, K]`` scaled, k ``[T, n, H, K]``, v ``[T, n, H, V]``, beta ``[T, n, H]``,
    log_decay ``[T, H]``, initial_state ``[N, H, K, V]``; ``chunk_size`` in sub-steps.
    Returns output ``[T, H, V]`` and final state ``[N, H, K, V]``.
    """
    tokens = min(chunk_size // k.shape[1], max(max_length(cu_seqlens), 1))
    layout = chunk_layout(cu_seqlens, tokens)
    q = _to_chunks(q, layout, head_axis=2)
    k, v, beta = (_to_chunks(x, layout, head_axis=3).flatten(2, 3) for x in (k, v, beta))
    if log_decay is None:
        log_decay = q.new_zeros(q.shape[:-1])
    else:
        log_decay = _to_chunks(log_decay, layout, head_axis=2)
    output, state = _ChunkedDeltaRule.apply(
        q, k, v, beta, log_decay, initial_state[layout.order], layout.steps
    )
    output = _FromChunks.apply(output, layout)
    return output, state[torch.argsort(layout.order)]


def _to_chunks(x: Tensor, layout: ChunkLayout, *, head_axis: int) -> Tensor:
    """``[T, ..., H, ...]`` to ``[chunks, H, tokens per chunk, ...]``, zeros at padding.

    ``head_axis`` is the place of H once the token axis has become (chunks, tokens per chunk).
    """
    return _ToChunks.apply(x, layout, head_axis)


def _gather(x: Tensor, layout: ChunkLayout) -> Tensor:
    """``[T, ...]`` to ``[chunks, tokens per chunk, ...]``, zeros at padding."""
    if layout.padded:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x[layout.token_index]


class _ToChunks(torch.autograd.Function):
    """Every token has one place, so the way back is a gather too, not a slow scatter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: ChunkLayout, head_axis: int) -> Tensor:
        ctx.layout, ctx.head_axis = layout, head_axis
        return _gather(x, layout).movedim(head_axis, 1).contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_chunks: Tensor) -> tuple[Tensor, None, None]:
        flat = d_chunks.movedim(1, ctx.head_axis).flatten(0, 1)
        return flat[ctx.layout.token_slot], None, None


class _FromChunks(torch.autograd.Function):
    """``[chunks, H, tokens per chunk, V]`` to ``[T, H, V]``."""

    @staticmethod
    def forward(ctx: Any, chunks: Tensor, layout: ChunkLayout) -> Tensor:
        ctx.layout = layout
        return chunks.transpose(1, 2).flatten(0, 1)[layout.token_slot]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:
        return _gather(d_output, ctx.layout).transpose(1, 2).contiguous(), None


class _Decay:
    """What a chunk's log-decays ``[n, H, Cq]`` mean for its C = Cq * substeps sub-steps."""

    def __init__(self, log_decay: Tensor, substeps: int):
        token = log_decay.cumsum(-1)
        step = token.repeat_interleave(substeps, -1)
        size = step.shape[-1]
        later = torch.ones(size, size, dtype=torch.bool, device=step.device).triu(1)
        difference = step[..., :, None] - step[..., None, :]
        self.pairs = difference.masked_fill_(later, -torch.inf).exp_()  # [n, H, C, C], j <= i
        self.read_pairs = self.pairs[..., substeps - 1 :: substeps, :]  # [n, H, Cq, C]
        self.to_query = token.exp()[..., None]  # from the chunk's start
        self.to_step = step.exp()[..., None]
        self.to_end = (step[..., -1:] - step).exp()[..., None]
        self.whole = step[..., -1].exp()[..., None, None]


class _ChunkedDeltaRule(torch.autograd.Function):
    """Shapes: q [n, H, Cq, K], k [n, H, C, K], v [n, H, C, V], beta [n, H, C], log_decay
    [n, H, Cq], initial_state [N, H, K, V] in the layout's order; n chunks of C = Cq * substeps."""

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
    ) -> tuple[Tensor, Tensor]:
        decay = _Decay(log_decay, k.shape[2] // max(q.shape[2], 1))
        # Rows and columns are scaled in the C x C matrices, which are smaller than k and v.
        # The solver reads below the diagonal only.
        a = (k @ k.mT).mul_(decay.pairs).mul_(beta[..., None])
        identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device).expand_as(a)
        t = torch.linalg.solve_triangular(a, identity, upper=False, unitriangular=True)
        t_beta = t * beta[..., None, :]
        written = t_beta @ v
        w = t_beta.mul_(decay.to_step.mT) @ k
        k_end = decay.to_end * k

        state = initial_state.clone()
        states = k.new_empty(k.shape[0], *state.shape[1:])
        for first, count in steps:
            chunk = slice(first, first + count)
            states[chunk] = state[:count]
            written[chunk] -= w[chunk] @ states[chunk]
            state[:count] *= decay.whole[chunk]
            state[:count] += k_end[chunk].mT @ written[chunk]
        pairs = (q @ k.mT).mul_(decay.read_pairs)
        output = (decay.to_query * q) @ states + pairs @ written

        ctx.save_for_backward(q, k, v, beta, log_decay, t, w, written, states, pairs)
        ctx.steps = steps
        return output, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_state: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, beta, log_decay, t, w, written, states, pairs = ctx.saved_tensors
        decay = _Decay(log_decay, k.shape[2] // max(q.shape[2], 1))
        beta = beta[..., None]
        k_end = decay.to_end * k

        d_written = pairs.mT @ d_output
        d_read = (decay.to_query * q).mT @ d_output
        d_state = d_state.clone()
        d_next = torch.empty_like(states)  # gradient of the state at each chunk's end
        for first, count in reversed(ctx.steps):
            chunk = slice(first, first + count)
            d_next[chunk] = d_state[:count]
            d_written[chunk] += k_end[chunk] @ d_next[chunk]
            d_state[:count] *= decay.whole[chunk]
            d_state[:count] += d_read[chunk] - w[chunk].mT @ d_written[chunk]

        x = t.mT @ d_written
        d_pairs = (d_output @ written.mT).mul_(decay.read_pairs)
        d_a = (x @ written.mT).mul_(decay.pairs).tril_(-1).neg_()
        row = d_a @ k - decay.to_step * (x @ states.mT)  # where k stands on the later side
        dq = d_pairs @ k + decay.to_query * (d_output @ states.mT)
        dk_end = decay.to_end * (written @ d_next.mT)
        d_a *= beta
        earlier = d_pairs.mT @ q + d_a.mT @ k + dk_end  # where k stands on the earlier side
        dk = earlier + beta * row
        dv = beta * x
        d_beta = (x * v).sum(-1) + (row * k).sum(-1)

        d_log_decay = None
        if ctx.needs_input_grad[4]:
            d_total = (k * (beta * row - earlier)).sum(-1)
            d_total[..., -1] += (k * dk_end).sum((-1, -2))
            d_total[..., -1] += decay.whole[..., 0, 0] * (states * d_next).sum((-1, -2))
            d_total = d_total.unflatten(-1, (q.shape[2], -1)).sum(-1) + (q * dq).sum(-1)
            d_log_decay = d_total.flip(-1).cumsum(-1).flip(-1)
        return dq, dk, dv, d_beta, d_log_decay, d_state, None
