"""Solves with the covariance of every token at once, by conjugate gradients.

Multiplying a vector for every token by that token's covariance is linear attention whose values are
its keys. What it makes of the keys alone is computed once for all iterations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.linear_attention.chunked import chunk_starts
from pretrain.ops.shared.chunk_decay import chunk_decay, chunk_tokens
from pretrain.ops.shared.chunking import from_chunks, to_chunks


@dataclass(frozen=True)
class Systems:
    """The matrices ``Phi_t + Diag(ridge)`` of all tokens, by what they are made of.

    Attributes:
        k: ``[T, H, K]``.
        write: ``[T, H, K]``, the keys times beta.
        log_decay: ``[T, H]``.
        ridge: ``[H, K]``.
        covariance: Phi before the first tokens, ``[N, H, K, K]``.
    """

    k: Tensor
    write: Tensor
    log_decay: Tensor
    ridge: Tensor
    covariance: Tensor


@torch.no_grad()
def solve(
    systems: Systems, q: Tensor, sequences: Sequences, chunk_size: int, iterations: int
) -> Tensor:
    """Return ``q_t (Phi_t + Diag(ridge))^-1`` ``[T, H, K]``, without a gradient."""
    layout = sequences.chunk_layout(chunk_tokens(chunk_size, 1, sequences.max_length, False))
    q, k, write = (to_chunks(x, layout, head_axis=2) for x in (q, systems.k, systems.write))
    decay = chunk_decay(to_chunks(systems.log_decay, layout, head_axis=2), 1)
    starts, _ = chunk_starts(decay, write, k, systems.covariance[layout.order], layout.steps)
    ridge = systems.ridge[:, None]

    def multiply(x: Tensor) -> Tensor:
        return (decay.to_query * x) @ starts + decay.pairs(x, write) @ k + ridge * x

    return from_chunks(conjugate_gradients(multiply, q, iterations), layout)


def conjugate_gradients(
    multiply: Callable[[Tensor], Tensor], target: Tensor, iterations: int
) -> Tensor:
    """Solve symmetric positive definite systems, whose unknowns are the last axis.

    A system that is solved before the last iteration stays so: its residual is 0 or gets smaller.
    """
    tiny = torch.finfo(target.dtype).tiny
    solution, residual, direction = torch.zeros_like(target), target, target
    size = residual.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        image = multiply(direction)
        step = size / (direction * image).sum(-1, keepdim=True).clamp_min(tiny)
        solution = solution + step * direction
        residual = residual - step * image
        before, size = size, residual.square().sum(-1, keepdim=True)
        direction = residual + size / before.clamp_min(tiny) * direction
    return solution


def with_gradient(
    residual: Tensor,
    solution: Tensor,
    systems: Systems,
    sequences: Sequences,
    chunk_size: int,
    iterations: int,
) -> Tensor:
    """Give a solution x of ``x A = q`` the gradient of one, by solving once more.

    ``residual`` is q - x A of x without a gradient, about 0, through autograd. As A is symmetric,
    what reaches it is ``dq = dx A^-1``, and from there A has its gradient ``-x^T dq``.
    """
    how = sequences, chunk_size, iterations
    made = (systems.k, systems.write, systems.log_decay, systems.ridge, systems.covariance)
    found: Tensor = _Solved.apply(residual, solution, how, *made)
    return found


class _Solved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, residual: Tensor, solution: Tensor, how: tuple[Any, ...], *made: Tensor
    ) -> Tensor:
        ctx.save_for_backward(*made)
        ctx.how = how
        return solution.view_as(solution)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_solution: Tensor) -> tuple[Tensor | None, ...]:
        made = ctx.saved_tensors
        return solve(Systems(*made), d_solution, *ctx.how), None, None, *[None] * len(made)
