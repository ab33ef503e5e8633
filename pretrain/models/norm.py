"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.parallel.layers import ParallelContext, constant, replicated_parameter


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis of ``x``; the result has x's dtype."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps)
    return (y if weight is None else y * weight).to(x.dtype)


class RMSNorm(nn.Module):
    """``x / rms(x) * weight`` over the last axis, ``dim`` wide; the weight starts at 1."""

    def __init__(self, dim: int, eps: float, context: ParallelContext):
        super().__init__()
        self.weight = replicated_parameter(context, (dim,), constant(1.0))
        self.eps = eps
        if context.megatron.sequence_parallel:
            # Each process sees a part of the tokens: megatron-core sums this gradient over them.
            setattr(self.weight, "sequence_parallel", True)  # noqa: B010

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)
