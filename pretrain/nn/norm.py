"""RMS normalisation (arXiv 1910.07467), computed in float32 or wider."""

from __future__ import annotations

from torch import Tensor, nn

from pretrain.nn.parameters import constant, replicated_parameter, used_on_local_tokens
from pretrain.ops.elementwise.rms_norm import rms_norm, scale_by_squares, sum_of_squares
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
