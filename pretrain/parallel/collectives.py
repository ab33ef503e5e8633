"""Collectives inside a model, with their gradients: over the tensor-parallel group, gloo or NCCL.

Activations are ``[T, B, ...]``; with sequence parallelism each rank holds ``T / size`` tokens.
The names and pairs of forward and backward are Megatron-LM's (arXiv 1909.08053, section 3;
arXiv 2205.05198, section 4.2.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def copy_to_tensor_parallel(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return x; all-reduce its gradient."""
    if group is None:
        return x
    result: Tensor = _CopyTo.apply(x, group)
    return result


def reduce_from_tensor_parallel(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All-reduce x, in place where it is contiguous; pass its gradient on as it is."""
    if group is None:
        return x
    result: Tensor = _ReduceFrom.apply(x, group)
    return result


def gather_sequence(
    x: Tensor, group: dist.ProcessGroup | None, *, reduce_gradient: bool = True
) -> Tensor:
    """Gather every rank's tokens along the first axis, ``[T / size, ...]`` to ``[T, ...]``.

    ``reduce_gradient``: whether what follows differs between ranks, so that the gradient of each
    token is summed over them; otherwise each rank takes its shard.
    """
    if group is None:
        return x
    result: Tensor = _GatherSequence.apply(x, group, reduce_gradient)
    return result


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Sum x over ranks and keep this rank's tokens, ``[T, ...]`` to ``[T / size, ...]``."""
    if group is None:
        return x
    result: Tensor = _ReduceScatterSequence.apply(x, group)
    return result


def gather_last_axis(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Gather the last axis, ``[..., V / size]`` to ``[..., V]``; each rank keeps its gradient."""
    if group is None:
        return x
    result: Tensor = _GatherLastAxis.apply(x, group)
    return result


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    full = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    dist.all_gather_into_tensor(full, x.contiguous(), group=group)
    return full


def _reduce_scattered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    local = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    dist.reduce_scatter_tensor(local, x.contiguous(), group=group)
    return local


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        x = x.contiguous()
        dist.all_reduce(x, group=group)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, reduce_gradient: bool) -> Tensor:
        ctx.group, ctx.reduce_gradient = group, reduce_gradient
        return _gathered(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        if ctx.reduce_gradient:
            return _reduce_scattered(gradients[0], ctx.group), None, None
        local = gradients[0].chunk(ctx.group.size(), 0)[ctx.group.rank()]
        return local.contiguous(), None, None


class _ReduceScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scattered(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _gathered(gradients[0], ctx.group), None


class _GatherLastAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = _gathered(x[None], group)
        return torch.cat(parts.unbind(0), -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].chunk(ctx.group.size(), -1)[ctx.group.rank()].contiguous(), None
