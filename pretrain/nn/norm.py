"""RMS and layer normalisation (arXiv 1910.07467, 1607.06450), in float32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.nn.parameters import constant, replicated_parameter, used_on_local_tokens
from pretrain.ops.elementwise.rms_norm import rms_norm, scale_by_squares, sum_of_squares
from pretrain.ops.shared.recomputation import recomputed
from pretrain.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel
from pretrain.parallel.context import ParallelContext


def sharded_rms_norm(x: Tensor, weight: Tensor, eps: float, context: ParallelContext) -> Tensor:
    """Normalise a width that is sharded over the tensor-parallel ranks, as :func:`rms_norm` does.

    x and ``weight`` are this rank's part; the mean of squares is over all ranks.
    """
    if context.tensor_size == 1:
        return rms_norm(x, weight, eps)
    # A copy, for the exchange overwrites what may be computed again.
    squares = sum_of_squares(x).clone()
    # All-reduced on the way forward, and its gradient again on the way back.
    squares = reduce_from_tensor_parallel(squares, context.group)
    squares = copy_to_tensor_parallel(squares, context.group)
    return scale_by_squares(x, squares, weight, x.shape[-1] * context.tensor_size, eps)


class RMSNorm(nn.Module):
    """RMS norm ``x / rms(x) * weight`` over the last axis, ``dim`` wide; the weight starts at 1."""

    def __init__(self, dim: int, eps: float, context: ParallelContext):
        super().__init__()
        weight = replicated_parameter(context, (dim,), constant(1.0))
        self.weight = used_on_local_tokens(weight, context)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., dim]``; the result has x's dtype."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer norm ``(x - mean(x)) / std(x) * weight + bias`` over the last axis, ``dim`` wide."""

    def __init__(self, dim: int, eps: float, context: ParallelContext):
        super().__init__()
        weight = replicated_parameter(context, (dim,), constant(1.0))
        bias = replicated_parameter(context, (dim,), constant(0.0), decay=False)
        self.weight = used_on_local_tokens(weight, context)
        self.bias = used_on_local_tokens(bias, context)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., dim]``; the result has x's dtype."""
        y: Tensor = recomputed(_layer_norm, x, self.weight, self.bias, self.eps)
        return y


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = x.shape[-1:]
    y = nn.functional.layer_norm(x.to(dtype), shape, weight.to(dtype), bias.to(dtype), eps)
    return y.to(x.dtype)


NORMS: dict[str, type[RMSNorm | LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}
