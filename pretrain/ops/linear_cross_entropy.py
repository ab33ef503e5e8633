"""Head and cross entropy in one, some tokens at a time: the logits of all tokens never exist."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tokens_at_once: int,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
) -> Tensor:
    """Cross entropy of ``softmax(f(x weight^T))`` at ``targets``, in nats; f(l) is ``softcap
    tanh(l / softcap)`` where that is given. The gradient is also that of ``z_loss_weight`` times
    the squared log-sum of a token's exponentials, which the value leaves out.

    x ``[N, d]``; weight ``[V, d]``, this process's rows of a vocabulary divided evenly over
    ``group`` (None: all of it); targets ``[N]`` int64, ids of the whole vocabulary. Returns ``[N]``
    in float32 or wider. Backward computes the logits again. The gradient of ``x`` is this process's
    part, to be summed over ``group`` by whatever made ``x``.
    """
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once is {tokens_at_once}, expected at least 1")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [N, d] and [V, d]"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets are {tuple(targets.shape)}, expected {tuple(x.shape[:1])}")
    divided = group if group is not None and dist.get_world_size(group) > 1 else None
    losses: Tensor = _LinearCrossEntropy.apply(
        x, weight, targets, tokens_at_once, divided, softcap, z_loss_weight
    )
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        tokens_at_once: int,
        group: dist.ProcessGroup | None,
        softcap: float | None,
        z_loss_weight: float,
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        log_sums = torch.empty(len(x), dtype=wide, device=x.device)
        losses = torch.empty_like(log_sums)
        ctx.first = 0 if group is None else dist.get_rank(group) * len(weight)
        for start in range(0, len(x), tokens_at_once):
            part = slice(start, start + tokens_at_once)
            logits = _capped((x[part] @ weight.t()).to(wide), softcap)
            largest = logits.amax(-1)
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            rows, columns = _own_targets(targets[part], ctx.first, len(weight))
            logits -= largest[:, None]
            wanted = torch.zeros_like(largest)
            wanted[rows] = logits[rows, columns]
            sums = torch.stack([logits.exp_().sum(-1), wanted])
            if group is not None:
                dist.all_reduce(sums, group=group)
            log_sums[part] = sums[0].log() + largest
            losses[part] = sums[0].log() - sums[1]
        ctx.save_for_backward(x, weight, targets, log_sums)
        ctx.tokens_at_once, ctx.softcap = tokens_at_once, softcap
        ctx.z_loss_weight = z_loss_weight
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets, log_sums = ctx.saved_tensors
        (gradient,) = gradients
        d_x = torch.empty_like(x)
        # Summed over the pieces in float32 whatever the dtype of the weights.
        d_weight = torch.zeros(weight.shape, dtype=log_sums.dtype, device=weight.device)
        for start in range(0, len(x), ctx.tokens_at_once):
            part = slice(start, start + ctx.tokens_at_once)
            logits = _capped((x[part] @ weight.t()).to(log_sums.dtype), ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
            d_logits = logits.sub_(log_sums[part, None]).exp_()
            if ctx.z_loss_weight > 0:
                d_logits.mul_(1 + 2 * ctx.z_loss_weight * log_sums[part, None])
            rows, columns = _own_targets(targets[part], ctx.first, len(weight))
            d_logits[rows, columns] -= 1
            if slope is not None:
                d_logits.mul_(slope)
            narrow = d_logits.mul_(gradient[part, None]).to(x.dtype)
            d_x[part] = narrow @ weight
            d_weight += narrow.t() @ x[part]
        return d_x, d_weight.to(weight.dtype), None, None, None, None, None


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _own_targets(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """(which tokens have their target among this process's rows of the vocabulary, which row)."""
    rows = torch.nonzero((targets >= first) & (targets < first + count)).squeeze(-1)
    return rows, targets[rows] - first
