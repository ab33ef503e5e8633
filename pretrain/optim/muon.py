"""Muon: momentum whose matrices are orthogonalised before they are applied (Keller Jordan 2024).

The iteration is torch's; here is what torch.optim.Muon lacks: matrices that lie on several tensor-
parallel processes, and many matrices in one parameter (experts).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _zeropower_via_newtonschulz,
)


@torch.no_grad()
def muon_step(params: Sequence[Any], state: Any, group: dict[str, Any]) -> None:
    """One update of matrices ``[d_out, d_in]``, or ``[n, d_in, d_out]`` for n of them.

    ``exp_avg`` in ``state`` is the momentum. The update has the root mean square of AdamW's, 0.2,
    whatever the shape (arXiv 2502.16982, equation 4). Every tensor-parallel process must call with
    its parts of the same matrices.
    """
    lr, momentum = group["lr"], group["muon_momentum"]
    for parameter in params:
        buffer, gradient = state[parameter]["exp_avg"], parameter.grad
        buffer.lerp_(gradient, 1 - momentum)
        update = gradient.lerp(buffer, momentum)  # Nesterov's
        if update.ndim == 3:
            whole = torch.stack([orthogonalised(matrix) for matrix in update])
            own = whole
        else:
            axis = _divided_axis(parameter)
            whole = orthogonalised(_gathered(update, axis))
            own = _own_part(whole, axis)
        parameter.mul_(1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(whole.shape[-2:]))
        parameter.add_(own.to(parameter.dtype), alpha=-lr * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of ``matrix = U S V^T``, in bfloat16, by five Newton-Schulz iterations."""
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    return _zeropower_via_newtonschulz(matrix, coefficients, DEFAULT_NS_STEPS, EPS)


def _divided_axis(parameter: Any) -> int | None:
    divided = getattr(parameter, "tensor_model_parallel", False)
    if divided and parallel_state.get_tensor_model_parallel_world_size() > 1:
        return int(parameter.partition_dim)
    return None


def _gathered(update: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return update
    group = parallel_state.get_tensor_model_parallel_group()
    parts = [torch.empty_like(update) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, update.contiguous(), group=group)
    return torch.cat(parts, axis)


def _own_part(whole: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return whole
    size = parallel_state.get_tensor_model_parallel_world_size()
    return whole.chunk(size, axis)[parallel_state.get_tensor_model_parallel_rank()]
