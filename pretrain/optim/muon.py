"""Muon: momentum whose matrices are orthogonalised before they are applied (Keller Jordan 2024).

The iteration is torch's; here is what torch.optim.Muon lacks: matrices that lie on several tensor-
parallel processes, and many matrices in one parameter (experts).
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import (
    DEFAULT_A,
    DEFAULT_B,
    DEFAULT_C,
    DEFAULT_NS_STEPS,
    EPS,
    _zeropower_via_newtonschulz,
)

from pretrain.nn.maximal_update import orthogonal_lr_multiple
from pretrain.nn.parameters import ParameterInfo
from pretrain.parallel.processes import groups

STATE_KEYS = ("exp_avg",)


def selects(info: ParameterInfo) -> bool:
    """Return whether a parameter is a matrix between activations, as Muon updates them."""
    return info.matrix


def lr_multiple(info: ParameterInfo) -> float:
    """Return the multiple for orthogonal updates that are scaled by the matrix's shape."""
    return orthogonal_lr_multiple(info.role, info.width)


@torch.no_grad()
def update(
    params: Sequence[Tensor],
    state: MutableMapping[Tensor, dict[str, Tensor]],
    group: dict[str, Any],
) -> None:
    """Update matrices ``[d_out, d_in]``, or ``[n, d_in, d_out]`` for n of them.

    ``exp_avg`` in ``state`` is the momentum. The update has the root mean square of AdamW's, 0.2,
    whatever the shape (arXiv 2502.16982, equation 4). Every tensor-parallel process must call with
    its parts of the same matrices.
    """
    lr, momentum = group["lr"], group["muon_momentum"]
    for parameter in params:
        buffer, gradient = state[parameter]["exp_avg"], cast(Tensor, parameter.grad)
        buffer.lerp_(gradient, 1 - momentum)
        step = gradient.lerp(buffer, momentum)  # Nesterov's
        if step.ndim == 3:
            full = local = torch.stack([orthogonalised(matrix) for matrix in step])
        else:
            axis = _sharded_axis(parameter)
            full = orthogonalised(_gathered(step, axis))
            local = _local_part(full, axis)
        parameter.mul_(1 - lr * group["weight_decay"])
        scale = 0.2 * math.sqrt(max(full.shape[-2:]))
        parameter.add_(local.to(parameter.dtype), alpha=-lr * scale)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Approximate U V^T of ``matrix = U S V^T``, in bfloat16, by five Newton-Schulz iterations."""
    coefficients = (DEFAULT_A, DEFAULT_B, DEFAULT_C)
    return _zeropower_via_newtonschulz(matrix, coefficients, DEFAULT_NS_STEPS, EPS)


def _sharded_axis(parameter: Any) -> int | None:
    """Return the axis that tensor-parallel ranks shard.

    By megatron-core's marks, which the float32 copies of parameters have as well.
    """
    state = groups()
    if state is None or state.get_tensor_model_parallel_world_size() == 1:
        return None
    sharded = getattr(parameter, "tensor_model_parallel", False)
    return int(parameter.partition_dim) if sharded else None


def _gathered(step: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return step
    group = groups().get_tensor_model_parallel_group()
    parts = [torch.empty_like(step) for _ in range(group.size())]
    dist.all_gather(parts, step.contiguous(), group=group)
    return torch.cat(parts, axis)


def _local_part(full: Tensor, axis: int | None) -> Tensor:
    if axis is None:
        return full
    group = groups().get_tensor_model_parallel_group()
    return full.chunk(group.size(), axis)[group.rank()]
