"""Kullback-Leibler divergence of distributions whose vocabulary is sharded over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def sharded_divergence(
    teacher: Tensor, logits: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Compute KL(teacher || model) of each token in nats, from logits.

    teacher, which takes no gradient, and logits ``[N, V / size]``, float32 or wider, this rank's
    part of the vocabulary. Returns ``[N]``. ``group``: None where the vocabulary is not sharded.
    """
    found: Tensor = _Divergence.apply(teacher, logits, group)
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, teacher: Tensor, logits: Tensor, group: dist.ProcessGroup | None
    ) -> Tensor:
        log_p = teacher - _log_sum_exp(teacher, group)
        log_q = logits - _log_sum_exp(logits, group)
        p = log_p.exp()
        found = (p * (log_p - log_q)).sum(-1)
        if group is not None:
            dist.all_reduce(found, group=group)
        ctx.save_for_backward(log_q.exp_().sub_(p))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (difference,) = ctx.saved_tensors
        return None, difference * gradients[0][:, None], None


def _log_sum_exp(logits: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return ``[N, 1]``, over all of the vocabulary."""
    largest = logits.amax(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    total = (logits - largest).exp().sum(-1, keepdim=True)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total.log() + largest
