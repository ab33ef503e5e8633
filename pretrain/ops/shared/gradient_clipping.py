"""Bounds on the gradient that is carried from step to step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _ClipGradient(torch.autograd.Function):
    """The identity, whose gradient is clamped to +-limit."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.limit = limit
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.clamp(-ctx.limit, ctx.limit), None


def clip_gradient(x: Tensor, limit: float | None) -> Tensor:
    """Return ``x``; clamp its gradient to +-``limit`` in the backward pass, unless that is None."""
    return x if limit is None else _ClipGradient.apply(x, limit)
