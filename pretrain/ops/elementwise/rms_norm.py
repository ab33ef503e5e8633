"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider, alone and with a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.elementwise.fusing import fused


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of ``x``; the result has x's dtype."""
    if x.is_cuda and (weight is None or weight.dtype == x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)  # one kernel, in float32 inside
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (y if weight is None else y * weight).to(x.dtype)


@fused
def rms_norm_silu_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) weight SiLU(gate)``; gate: of x's shape and dtype."""
    return rms_norm(x, weight, eps) * F.silu(gate)


@fused
def rms_norm_sigmoid_gate(x: Tensor, weight: Tensor, gate: Tensor, eps: float) -> Tensor:
    """Return ``rms_norm(x) weight sigmoid(gate)``; gate: of x's shape and dtype."""
    return rms_norm(x, weight, eps) * torch.sigmoid(gate)
