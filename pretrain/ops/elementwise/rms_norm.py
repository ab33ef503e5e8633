"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider, alone and with a gate.

On a GPU each is one kernel each way, which keeps x in its dtype, the weight and a number a row.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.shared.planning import device_type


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute :func:`rms_norm` for functions that are fused as a whole."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if weight is not None and weight.ndim == 1 and device_type(x) == "cpu":
        on_cpu: Tensor = _RMSNorm.apply(x.to(dtype), weight.to(dtype), eps)
        return on_cpu.to(x.dtype)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (y if weight is None else y * weight).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """The norm on a CPU, which has no kernel of it: a third of the passes of torch's own gradient.

    With r = 1 / rms(x) and p = dy x:  dx = r (dy w - x r^2 (p w) / n),  dw = sum r p.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        product = (gradient * x).reshape(-1, x.shape[-1])
        sums = (product @ weight).view(scale.shape)
        d_x = (gradient * weight).mul_(scale)
        d_x.addcmul_(x, sums.mul_(scale**3).div_(x.shape[-1]), value=-1)
        return d_x, scale.flatten() @ product, None


@fused(native=True)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of ``x``; the result has x's dtype."""
    return normalised(x, weight, eps)


@fused
def rms_norm_silu_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) weight SiLU(gate)``; gate: of x's shape and dtype."""
    return normalised(x, weight, eps) * F.silu(gate)


@fused
def rms_norm_sigmoid_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) weight sigmoid(gate)``; gate: of x's shape and dtype."""
    return normalised(x, weight, eps) * torch.sigmoid(gate)


@fused
def sum_of_squares(x: Tensor) -> Tensor:
    """Return ``sum x^2`` over the last axis ``[..., 1]``, in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1, keepdim=True)


@fused
def scale_by_squares(x: Tensor, squares: Tensor, weight: Tensor, width: int, eps: float) -> Tensor:
    """Return ``x weight / sqrt(squares / width + eps)`` in x's dtype; squares ``[..., 1]``."""
    return (x.to(squares.dtype) * torch.rsqrt(squares / width + eps) * weight).to(x.dtype)
