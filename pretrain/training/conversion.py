"""Blocks of one model made from those of another, with mixers that are converted on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.common.errors import UserError
from pretrain.config import InitializeConfig
from pretrain.model.depth_lora import DepthLoRA
from pretrain.model.spec import BlockSpec, sizes_taken_over
from pretrain.nn.mixers.attention import Attention
from pretrain.nn.mixers.base import Mixer
from pretrain.nn.mixers.conversion import converted, own_parameters
from pretrain.nn.parameters import info_of
from pretrain.parallel.context import ParallelContext

Values = Mapping[str, Tensor]
Taken = Literal["whole", "qkvo", "none"]  # how a mixer begins: as it is in the source, or convert's


def taken_of(
    number: int,
    spec: BlockSpec,
    origins: Mapping[int, BlockSpec],
    hidden_size: int,
    config: InitializeConfig,
    where: str,
) -> Taken:
    """Return how the mixer of block ``number`` begins, which is made from blocks of the source.

    Raises UserError where they do not fit.
    """
    how = config.convert.get(spec.name)
    if how == "none":
        return "none"
    others = {i: origin for i, origin in origins.items() if origin.identity != spec.identity}
    if how is None or not others:
        for i, origin in others.items():
            raise UserError(
                f"block {number} of the model is {spec.name} {spec.identity}, but block {i} of "
                f"{where} is {origin.name} {origin.identity}; expected the same, or "
                f"initialize.convert to say what {spec.name} begins as"
            )
        return "whole"
    for i, origin in origins.items():
        if not issubclass(origin.mixer, Attention):
            raise UserError(
                f"block {number} of the model is {spec.name}, to begin as attention "
                f"(initialize.convert.{spec.name}=qkvo), but block {i} of {where} is {origin.name}"
            )
        _check_sizes(spec, origin, i, hidden_size, where)
    return "qkvo"


def _check_sizes(
    spec: BlockSpec, origin: BlockSpec, number: int, hidden_size: int, where: str
) -> None:
    for name, value in sizes_taken_over(spec.name, spec.mixer, origin, hidden_size, where).items():
        found = getattr(spec.config, name)
        if found != value:
            raise UserError(
                f"model.mixers.{spec.name}.{name} is {found}, expected {value}, which fits the "
                f"attention that it takes over, block {number} of {where}"
            )


def values_of(target: nn.Module, origin: nn.Module, how: Taken) -> dict[str, Tensor]:
    """Return what block ``target`` takes of block ``origin``, by its own parameters' names."""
    values = own_parameters(origin)
    if how == "whole":
        return values
    values = {name: value for name, value in values.items() if not name.startswith("mixer.")}
    if how == "qkvo":
        mixer, attention = target.get_submodule("mixer"), origin.get_submodule("mixer")
        assert isinstance(mixer, Mixer) and isinstance(attention, Attention)
        assert mixer.conversion is not None
        found = converted(
            mixer.conversion,
            vars(mixer)["config"],
            own_parameters(mixer),
            own_parameters(attention),
            attention.head_dim,
        )
        values |= {f"mixer.{name}": value for name, value in found.items()}
    return values


def put(
    target: nn.Module,
    values: Sequence[Values],
    where: str,
    *,
    begin_anew: tuple[str, ...] = (),
) -> None:
    """Set every parameter of ``target`` to the mean of its ``values``, given by name.

    Without any, low-rank differences, residual scales and names that begin as ``begin_anew`` says
    keep their initial values. Raises UserError where others have none, or another shape; ``where``
    names the source.
    """
    for name, parameter in own_parameters(target).items():
        found = [given[name] for given in values if name in given]
        optional = name.endswith((".lora_a", ".lora_b", "residual_scales"))
        if not found and (optional or name.startswith(begin_anew)):
            continue
        shapes = {tuple(f.shape) for f in found}
        if len(found) != len(values) or shapes != {tuple(parameter.shape)}:
            raise UserError(
                f"{where}: {type(target).__name__}'s {name} has the shapes {sorted(shapes)}, "
                f"expected {tuple(parameter.shape)}"
            )
        parameter.copy_(torch.stack(found).mean(0))


def low_rank(target: nn.Module, replaced: Sequence[Values], context: ParallelContext) -> None:
    """Set each pass's lora_b lora_a to the best approximation of (replaced - shared).

    ``replaced`` are the values of each pass's block; what begins anew keeps its initial difference,
    of zero.
    """
    for name, module in target.named_modules():
        key = f"{name.replace('inner.', '')}.weight"
        if not isinstance(module, DepthLoRA) or any(key not in values for values in replaced):
            continue
        rank = module.lora_a.shape[1]
        module.lora_a.zero_()
        module.lora_b.zero_()
        for depth, values in enumerate(replaced):
            full = values[key]
            lost = (full - module.weight).to(torch.promote_types(full.dtype, torch.float32))
            # Every process decomposes the whole matrix, as one process alone would.
            u, s, v = torch.linalg.svd(_whole(lost, module.weight, context), full_matrices=False)
            r = min(rank, len(s))
            root = s[:r].sqrt()
            module.lora_b[depth, :, :r] = _part(u[:, :r] * root, module.lora_b, 1)
            module.lora_a[depth, :r] = _part(root[:, None] * v[:r], module.lora_a, 2)


def _whole(part: Tensor, weight: nn.Parameter, context: ParallelContext) -> Tensor:
    """Return the matrix of which every tensor-parallel process has such a part as of ``weight``."""
    shard = info_of(weight).shard
    if shard is None or context.group is None:
        return part
    parts = [torch.empty_like(part) for _ in range(shard.count)]
    dist.all_gather(parts, part.contiguous(), group=context.group)
    return torch.cat(parts, shard.axis)


def _part(whole: Tensor, difference: nn.Parameter, axis: int) -> Tensor:
    """Return this process's part of one pass's ``difference``, which is sharded along ``axis``."""
    shard = info_of(difference).shard
    if shard is None:
        return whole
    assert shard.axis == axis
    return whole.chunk(shard.count, axis - 1)[shard.index]
