"""Cross entropy of logits whose vocabulary is sharded over the tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.ops.cross_entropy.linear_cross_entropy import local_targets


def sharded_cross_entropy(
    logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute the cross entropy of each target in nats (arXiv 1909.08053, section 3).

    logits ``[..., V / size]``, float32 or wider, this rank's part of the vocabulary, overwritten;
    targets ``[...]`` int64, ids of the full vocabulary. Returns ``[...]``. ``group``: None where
    the vocabulary is not sharded.
    """
    losses: Tensor = _ShardedCrossEntropy.apply(logits, targets, group)
    return losses


class _ShardedCrossEntropy(torch.autograd.Function):
    """Cross entropy that keeps only the softmax, in the memory of the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        count = logits.shape[-1]
        largest = logits.amax(-1)
        if group is not None:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        first = 0 if group is None else group.rank() * count
        column, inside = local_targets(targets, first, count)
        logits = logits.detach().sub_(largest[..., None])
        wanted = logits.gather(-1, column[..., None])[..., 0] * inside
        sums = logits.exp_().sum(-1)
        if group is not None:
            dist.all_reduce(wanted, group=group)
            dist.all_reduce(sums, group=group)
        losses = sums.log() - wanted
        ctx.save_for_backward(logits.div_(sums[..., None]), column, inside)
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        softmax, column, inside = ctx.saved_tensors
        softmax.scatter_add_(-1, column[..., None], -inside.to(softmax.dtype)[..., None])
        return softmax.mul_(gradient[..., None]), None, None
