"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider, alone and with a gate.

On a GPU each is one kernel each way, which keeps x in its dtype, the weight and a number a row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.elementwise.fusing import fused


def normalised(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Compute :func:`rms_norm` for functions that are fused as a whole."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (y if weight is None else y * weight).to(x.dtype)


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
