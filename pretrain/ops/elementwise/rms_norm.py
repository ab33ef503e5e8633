"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider, alone and with a gate."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.shared.planning import fused_stand_in, is_planned


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of ``x``; the result has x's dtype."""
    if is_planned(x):
        return cast(Tensor, fused_stand_in(_rms_norm, (x, weight, eps)))
    if x.is_cuda and (weight is None or weight.dtype == x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)  # one kernel, in float32 inside
    return _rms_norm(x, weight, eps)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
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
