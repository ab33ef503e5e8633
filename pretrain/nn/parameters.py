"""One description per parameter, and its values by the description, whatever the layout.

A parameter is made empty with a :class:`ParameterInfo`; :func:`fill_parameters` gives this rank's
part of it the values that its name stands for, so that a model is the same under any layout.
Optimizers, checkpoints and the planner read the same description.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from pretrain.nn.maximal_update import Role, start_multiple
from pretrain.parallel.context import ParallelContext

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class Normal:
    """Draw from a Gaussian with mean 0, each element alone, so that parts can be drawn alone."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return torch.randn(shape, generator=generator) * self.std


@dataclass(frozen=True)
class Constant:
    """Set every element to one value."""

    value: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return torch.full(shape, self.value)


def normal(std: float) -> Initializer:
    """Return an initializer that draws from a Gaussian with mean 0."""
    return Normal(std)


def constant(value: float) -> Initializer:
    """Return an initializer that sets one value everywhere."""
    return Constant(value)


@dataclass(frozen=True)
class Shard:
    """The part of a tensor that a rank holds: one of ``count`` equal parts along ``axis``."""

    axis: int
    index: int
    count: int
    over: Literal["tensor", "expert"] = "tensor"


@dataclass(frozen=True)
class ParameterInfo:
    """The description of a parameter for initialisation, optimizers, checkpoints and the planner.

    Attributes:
        init: How its values are drawn, at the base model's width.
        weight_decay: Whether weight decay may apply.
        shard: This rank's part; None where every tensor-parallel rank holds all of it.
        matrix: Whether it maps activations to activations in a block, as Muon's parameters do.
        role: What grows with the model, for maximal-update parametrization, which decides on the
            size of its start and of its updates by it.
        width: The model's, as a multiple of the base model's; 1 without that parametrization.
        sum_gradient: Whether, under sequence parallelism, each rank applies it to its local tokens,
            so that its gradient is summed over ranks.
        tied: Whether other stages of a pipeline hold a copy of it: of a tied embedding, or a table.
        copy: Whether it is not the first one, so counts in no norm and is written to no checkpoint.
        max_lr: What its peak learning rate is at most; None: no limit.
        waits: Whether it is left as it is while a model's new mixers are aligned with a teacher.
    """

    init: Initializer
    weight_decay: bool = True
    shard: Shard | None = None
    matrix: bool = False
    role: Role = "input"
    width: float = 1.0
    sum_gradient: bool = False
    tied: bool = False
    copy: bool = False
    max_lr: float | None = None
    waits: bool = False


def describe(parameter: nn.Parameter, info: ParameterInfo) -> nn.Parameter:
    """Attach a description; vectors and scalars never get weight decay. Return the parameter."""
    if parameter.ndim < 2:
        info = dataclasses.replace(info, weight_decay=False)
    cast(Any, parameter).info = info
    return parameter


def info_of(parameter: Tensor) -> ParameterInfo:
    """Return a parameter's description. Raises ValueError where it was made without one."""
    info: ParameterInfo | None = getattr(parameter, "info", None)
    if info is None:
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has no description: make it with the "
            "functions of pretrain.nn.parameters, or call describe() on it"
        )
    return info


def change_info(parameter: nn.Parameter, **changes: Any) -> nn.Parameter:
    """Replace fields of a parameter's description. Return the parameter."""
    return describe(parameter, dataclasses.replace(info_of(parameter), **changes))


class DescribedModule(nn.Module):
    """An nn.Module whose parameters keep their descriptions when it is copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(
            {key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()}
        )
        for mine, its in zip(self.parameters(), copied.parameters(), strict=True):
            if hasattr(mine, "info"):
                cast(Any, its).info = cast(Any, mine).info
        return copied


def _empty(
    context: ParallelContext, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype or context.dtype, device=context.device))


def tensor_shard(context: ParallelContext, axis: int) -> Shard:
    """Return this rank's shard along ``axis``, all of it where tensor parallelism is off.

    The axis decides how large parameters are drawn, so it is the same under every layout.
    """
    return Shard(axis, context.tensor_rank, context.tensor_size)


def sharded_parameter(
    context: ParallelContext,
    shape: tuple[int, ...],
    init: Initializer,
    *,
    dtype: torch.dtype | None = None,
    decay: bool = True,
) -> nn.Parameter:
    """Make a parameter whose first axis (heads, channels) is sharded; ``shape`` is the local one.

    dtype: the context's unless given; decay: whether weight decay may apply.
    """
    info = ParameterInfo(init, decay, tensor_shard(context, 0))
    return describe(_empty(context, shape, dtype), info)


def replicated_parameter(
    context: ParallelContext,
    shape: tuple[int, ...],
    init: Initializer,
    *,
    decay: bool = True,
    role: Role = "input",
) -> nn.Parameter:
    """Make a parameter that every tensor-parallel rank holds in full."""
    return describe(
        _empty(context, shape), ParameterInfo(init, decay, role=role, width=context.width)
    )


def matrix_info(
    context: ParallelContext, std: float, shard: Shard | None, *, role: Role = "hidden"
) -> ParameterInfo:
    """Describe a matrix between activations, of standard deviation ``std`` in the base model."""
    return ParameterInfo(normal(std), shard=shard, matrix=True, role=role, width=context.width)


def matrix_parameter(
    context: ParallelContext,
    shape: tuple[int, ...],
    std: float,
    shard_axis: int | None,
    *,
    role: Role = "hidden",
) -> nn.Parameter:
    """Make a matrix between activations, of local ``shape``; see :func:`matrix_info`."""
    shard = None if shard_axis is None else tensor_shard(context, shard_axis)
    return describe(_empty(context, shape), matrix_info(context, std, shard, role=role))


def expert_matrices(
    context: ParallelContext, shape: tuple[int, int, int], std: float
) -> nn.Parameter:
    """Make a matrix per expert, the first axis of the global ``shape``, sharded over expert ranks.

    Its gradient is summed over the ranks that hold the same experts. Raises ValueError where the
    experts do not divide evenly.
    """
    size = context.expert_size
    if shape[0] % size:
        raise ValueError(f"{shape[0]} experts do not divide over {size} expert-parallel processes")
    shard = Shard(0, context.expert_rank, size, over="expert")
    local = (shape[0] // size, *shape[1:])
    return describe(_empty(context, local), matrix_info(context, std, shard))


def used_on_local_tokens(parameter: nn.Parameter, context: ParallelContext) -> nn.Parameter:
    """Mark a replicated parameter that sequence parallelism applies to each rank's local tokens."""
    return change_info(parameter, sum_gradient=context.sequence_parallel)


# Larger parameters are drawn in pieces, each with a separate seed: a rank draws what it holds.
_WHOLE, _PIECES = 2**20, 64


@torch.no_grad()
def fill_parameters(
    module: nn.Module, seed: int, *, prefix: str = "", device: torch.device | None = None
) -> None:
    """Give every parameter its values, also where the module was built on the meta device.

    The values depend only on ``seed`` and the names, which begin with ``prefix``. ``device`` is
    where parameters of the meta device are put, torch's default device unless given. Raises
    ValueError for a parameter without a description.
    """
    for name, owner, key in _named_owners(module):
        parameter = cast(nn.Parameter, owner._parameters[key])
        info = info_of(parameter)
        if parameter.is_meta:
            home = torch.get_default_device() if device is None else device
            # Of a tensor without memory, empty_like would import sympy.
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device=home)
            filled = nn.Parameter(values, parameter.requires_grad)
            vars(filled).update(vars(parameter))
            owner._parameters[key] = parameter = filled
        _draw(parameter, parameter, info.init, f"{seed}:{prefix}{name}")
        multiple = start_multiple(info.role, info.width)
        if multiple != 1:
            parameter.mul_(multiple)


def _named_owners(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{path}.{key}" if path else key, owner, key


@torch.no_grad()
def draw_like(parameter: nn.Parameter, std: float, key: str) -> Tensor:
    """Draw Gaussian values for this rank's part of a parameter, float32 on its device.

    The values of the global parameter depend on ``key`` alone.
    """
    values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    _draw(values, parameter, Normal(std), key)
    return values


def _draw(target: Tensor, parameter: nn.Parameter, init: Initializer, key: str) -> None:
    if target.is_meta:
        return
    shape, axis, start = list(parameter.shape), 0, 0
    shard = info_of(parameter).shard
    if shard is not None:
        axis = shard.axis
        start = shard.index * shape[axis]
        shape[axis] *= shard.count
    if not isinstance(init, Normal) or math.prod(shape) <= _WHOLE:
        full = init(tuple(shape), _generator(key))
        target.copy_(full.narrow(axis, start, parameter.shape[axis]) if shape else full)
        return
    stop, size = start + parameter.shape[axis], shape[axis]
    for piece in range(_PIECES):
        first, last = piece * size // _PIECES, (piece + 1) * size // _PIECES
        low, high = max(first, start), min(last, stop)
        if low < high:
            shape[axis] = last - first
            values = init(tuple(shape), _generator(f"{key}:{piece}"))
            target.narrow(axis, low - start, high - low).copy_(
                values.narrow(axis, low - first, high - low)
            )


def _generator(key: str) -> torch.Generator:
    digest = hashlib.sha256(key.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def swapped_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters whose memory DeepSpeed's ZeRO-3 takes away between their uses."""
    return [parameter for parameter in module.parameters() if hasattr(parameter, "ds_id")]
