"""Head and cross entropy in one, some tokens at a time: all tokens' logits are never stored."""

from __future__ import annotations

import functools
import importlib.metadata
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.ops.shared.planning import Work, device_type, nbytes, observe

BACKENDS = ("auto", "chunked", "liger")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    tokens_at_once: int,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
    z_loss_weight: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Compute the cross entropy of ``softmax(f(x weight^T))`` at ``targets``, in nats.

    f(l) is ``softcap tanh(l / softcap)`` where that is given. The gradient is also that of
    ``z_loss_weight`` times the squared log-sum of a token's exponentials, which the value excludes.

    x ``[N, d]``; weight ``[V, d]``, this process's rows of a vocabulary sharded evenly over
    ``group`` (None: all of it); targets ``[N]`` int64, ids of the full vocabulary. Returns ``[N]``
    in float32 or wider. Backward computes the logits again. The gradient of ``x`` is this process's
    part, to be summed over ``group`` by whatever made ``x``.

    backend: ``chunked`` is ours; ``liger`` uses Liger's kernel for everything between the matrix
    products, the logits being rounded to x's dtype; it needs the full vocabulary here, and no
    softcap. ``auto`` takes it on CUDA where it is installed and x is not float64. Raises ValueError
    for shapes that do not fit and a backend that cannot be used.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is '{backend}', expected one of {BACKENDS}")
    if tokens_at_once < 1:
        raise ValueError(f"tokens_at_once is {tokens_at_once}, expected at least 1")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected [N, d] and [V, d]"
        )
    if targets.shape != x.shape[:1]:
        raise ValueError(f"targets are {tuple(targets.shape)}, expected {tuple(x.shape[:1])}")
    shards = group if group is not None and group.size() > 1 else None
    unsharded = shards is None and softcap is None
    if backend == "liger" and not unsharded:
        raise ValueError("backend 'liger' needs the full vocabulary here, and has no softcap")
    if backend == "auto" and unsharded and device_type(x) == "cuda" and x.dtype != torch.float64:
        backend = "liger" if has_liger() or x.is_meta else "chunked"
    if backend == "liger":
        liger: Tensor = _LigerCrossEntropy.apply(x, weight, targets, tokens_at_once, z_loss_weight)
        return liger
    losses: Tensor = _LinearCrossEntropy.apply(
        x, weight, targets, tokens_at_once, shards, softcap, z_loss_weight
    )
    return losses


@functools.cache
def has_liger() -> bool:
    """Return whether a liger-kernel is installed whose kernel has the arguments used here."""
    try:
        return importlib.metadata.version("liger-kernel").startswith("0.8.")
    except importlib.metadata.PackageNotFoundError:
        return False


def _liger(logits: Tensor, targets: Tensor, z_loss_weight: float, gradient: bool) -> Tensor:
    """Return the losses ``[N]``, without the z-loss; with ``gradient`` the logits become theirs."""
    if logits.is_meta:  # in a plan; it reads the logits twice, and writes them with a gradient
        observe(Work(kind="elementwise"), (2 + gradient) * nbytes([logits]), logits.dtype)
        return logits.new_empty(len(logits), dtype=torch.float32)
    import triton
    from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

    losses, z_losses = torch.zeros(2, len(logits), device=logits.device).unbind(0)
    on_device = torch.cuda.device(logits.device) if logits.is_cuda else nullcontext()
    with on_device:
        liger_cross_entropy_kernel[(len(logits),)](
            X_ptr=logits,
            X_stride=logits.stride(0),
            Y_ptr=targets,
            Y_stride=targets.stride(0),
            weight_ptr=logits,
            loss_ptr=losses,
            z_loss_ptr=z_losses,
            loss_stride=1,
            token_accuracy_ptr=losses,
            token_accuracy_stride=0,
            predicted_tokens_ptr=losses,
            predicted_tokens_stride=0,
            n_cols=logits.shape[1],
            n_non_ignore=1,
            sum_non_ignore_weight=1,
            weight_sum=0.0,
            ignore_index=-100,
            lse_square_scale=z_loss_weight,
            label_smoothing=0.0,
            reduction="sum",
            softcap=None,
            RETURN_Z_LOSS=True,
            RETURN_TOKEN_ACCURACY=False,
            RETURN_PREDICTED_TOKENS=False,
            BLOCK_SIZE=min(32768, triton.next_power_of_2(logits.shape[1])),
            HAS_WEIGHT=False,
            HAS_SOFTCAPPING=False,
            HAS_GRADIENTS=gradient,
            num_warps=32,
        )
    return losses - z_losses


class _LigerCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        tokens_at_once: int,
        z_loss_weight: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, targets)
        ctx.options = tokens_at_once, z_loss_weight
        pieces = zip(x.split(tokens_at_once), targets.split(tokens_at_once), strict=True)
        losses = [_liger(a @ weight.t(), t, z_loss_weight, False) for a, t in pieces]
        return torch.cat(losses)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, targets = ctx.saved_tensors
        tokens_at_once, z_loss_weight = ctx.options
        d_x = torch.empty_like(x)
        d_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        for start in range(0, len(x), tokens_at_once):
            part = slice(start, start + tokens_at_once)
            d_logits = x[part] @ weight.t()
            _liger(d_logits, targets[part], z_loss_weight, True)
            d_logits *= gradient[part, None].to(d_logits.dtype)
            d_x[part] = d_logits @ weight
            d_weight += d_logits.t() @ x[part]
        return d_x, d_weight.to(weight.dtype), None, None, None


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
        ctx.first = 0 if group is None else group.rank() * len(weight)
        for start in range(0, len(x), tokens_at_once):
            part = slice(start, start + tokens_at_once)
            logits = capped((x[part] @ weight.t()).to(wide), softcap)
            largest = logits.amax(-1)
            if group is not None:
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
            column, local = local_targets(targets[part], ctx.first, len(weight))
            logits -= largest[:, None]
            wanted = logits.gather(1, column[:, None])[:, 0].mul_(local)
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
            logits = capped((x[part] @ weight.t()).to(log_sums.dtype), ctx.softcap)
            slope = None if ctx.softcap is None else 1 - (logits / ctx.softcap).square_()
            d_logits = logits.sub_(log_sums[part, None]).exp_()
            if ctx.z_loss_weight > 0:
                d_logits.mul_(1 + 2 * ctx.z_loss_weight * log_sums[part, None])
            column, local = local_targets(targets[part], ctx.first, len(weight))
            d_logits.scatter_add_(1, column[:, None], local.to(d_logits.dtype).neg()[:, None])
            if slope is not None:
                d_logits.mul_(slope)
            low_precision = d_logits.mul_(gradient[part, None]).to(x.dtype)
            d_x[part] = low_precision @ weight
            d_weight += low_precision.t() @ x[part]
        return d_x, d_weight.to(weight.dtype), None, None, None, None, None


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Compute ``softcap tanh(logits / softcap)`` in place; None leaves logits as they are."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def local_targets(targets: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
    """Return (which of this process's rows of the vocabulary each target is, whether it is one)."""
    column = targets - first
    local = (column >= 0) & (column < count)
    return torch.where(local, column, 0), local
