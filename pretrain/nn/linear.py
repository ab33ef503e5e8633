"""Tensor-parallel layers, and one way to initialise parameters whatever the layout.

The layers are megatron-core's, made without initialisation; each parameter carries the recipe of
its values instead (:func:`with_init`). :func:`fill_parameters` gives this process's slice of every
parameter the values that its name stands for, so a model is the same under any layout.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from pretrain.parallel.processes import local_device
from pretrain.parallel.shared_input import project, share_input, summed_gradient

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class ParallelContext:
    """What a layer needs to know of its surroundings.

    megatron:  megatron-core's model-parallel settings
    dtype:     dtype of weights and activations
    width:     of the layers that are made, as a multiple of the width that initialisation and
               learning rate were chosen at (maximal-update parametrization); 1: without it
    """

    megatron: TransformerConfig
    dtype: torch.dtype
    width: float = 1.0

    @property
    def group(self) -> dist.ProcessGroup:
        """The tensor-parallel process group."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def tensor_size(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def device(self) -> torch.device:
        """Where new tensors belong: torch's default device if one is set, else this process's."""
        default = torch.get_default_device()
        return default if default.type != "cpu" else local_device()

    def local(self, count: int, what: str) -> int:
        """This process's share of ``count`` heads or channels. Raises ValueError if uneven."""
        if count % self.tensor_size:
            raise ValueError(
                f"{what} is {count}, which tensor parallel size {self.tensor_size} does not divide"
            )
        return count // self.tensor_size


def expert_matrices(
    context: ParallelContext, shape: tuple[int, int, int], std: float
) -> nn.Parameter:
    """A matrix for each of the experts, the first axis, divided over expert-parallel processes;
    ``shape`` is the whole one. Its gradient is summed over the processes that hold the same
    experts. Raises ValueError if uneven."""
    size = parallel_state.get_expert_model_parallel_world_size()
    if shape[0] % size:
        raise ValueError(f"{shape[0]} experts do not divide over {size} expert-parallel processes")
    own = (shape[0] // size, *shape[1:])
    parameter = nn.Parameter(torch.empty(own, dtype=context.dtype, device=context.device))
    # For megatron-core: no tensor-parallel process has a copy that would count twice in norms.
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    tagged: Any = parameter
    tagged.allreduce, tagged.expert_parallel = False, True
    return hidden_matrix(parameter, context, std)


def shard_of(parameter: Any) -> tuple[int, int, int] | None:
    """(axis, number of parts, which of them this process has) of a divided parameter."""
    if getattr(parameter, "expert_parallel", False):
        return (
            0,
            parallel_state.get_expert_model_parallel_world_size(),
            parallel_state.get_expert_model_parallel_rank(),
        )
    if getattr(parameter, "tensor_model_parallel", False):
        return (
            parameter.partition_dim,
            parallel_state.get_tensor_model_parallel_world_size(),
            parallel_state.get_tensor_model_parallel_rank(),
        )
    return None


@dataclass(frozen=True)
class Normal:
    """Gaussian with mean 0, every element for itself: parts of it can be drawn alone."""

    std: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        return torch.randn(shape, generator=generator) * self.std


def normal(std: float) -> Initializer:
    """Gaussian with mean 0."""
    return Normal(std)


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return lambda shape, generator: torch.full(shape, value)


def with_init(parameter: nn.Parameter, init: Initializer, *, decay: bool = True) -> nn.Parameter:
    """Attach the recipe of a parameter's values, and whether weight decay may apply to it."""
    tagged: Any = parameter
    tagged.init = init
    tagged.decay = decay and parameter.ndim > 1
    return parameter


def hidden_matrix(
    parameter: nn.Parameter, context: ParallelContext, std: float, *, grows: bool = True
) -> nn.Parameter:
    """A matrix between activations: Muon's share of the parameters. Where the number of inputs
    ``grows`` with the model, the maximal-update parametrization starts it smaller by the root of
    the width's multiple and trains it slower by the multiple (arXiv 2203.03466, table 8)."""
    tagged: Any = parameter
    tagged.hidden_matrix = True
    width = context.width if grows else 1.0
    tagged.lr_mult = 1 / width
    return with_init(parameter, normal(std * width**-0.5))


def used_on_part_of_the_tokens(parameter: nn.Parameter, context: ParallelContext) -> nn.Parameter:
    """Mark a replicated parameter that, under sequence parallelism, each process applies to tokens
    of its own: megatron-core then sums its gradient over them."""
    tagged: Any = parameter
    tagged.sequence_parallel = context.megatron.sequence_parallel
    return parameter


class ReadsSharedInput(nn.Module):
    """A projection that calls :func:`project` on its input, with ``id(self)``."""

    replicated = False  # whether every process has the whole weight

    def input_weight(self) -> Tensor:
        """What the input is multiplied by, to give its gradient to."""
        return cast(Tensor, self.weight)


def _may_share(projection: ReadsSharedInput) -> bool:
    """DeepSpeed's ZeRO-3 takes weights away again behind the layer that uses them."""
    weight = cast(nn.Parameter, projection.weight)
    return weight.requires_grad and not hasattr(weight, "ds_id")


class ColumnLinear(tensor_parallel.ColumnParallelLinear, ReadsSharedInput):
    """Linear without bias whose outputs are divided."""

    def _forward_impl(self, input: Tensor, weight: Tensor, **settings: Any) -> Tensor:
        shared = project(input, weight, id(self))
        return super()._forward_impl(input, weight, **settings) if shared is None else shared


def column_linear(
    context: ParallelContext, d_in: int, d_out: int, std: float, *, grows: bool = True
) -> nn.Module:
    """Linear without bias whose outputs are divided; its input comes from :func:`column_input`.
    ``grows``: whether d_in does with the model, see :func:`hidden_matrix`."""
    layer: Any = ColumnLinear(
        d_in,
        d_out,
        config=context.megatron,
        init_method=None,
        bias=False,
        gather_output=False,
        disable_grad_reduce=True,
        tp_group=context.group,
    )
    layer.sequence_parallel = False  # column_input has gathered already, once for all projections
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    hidden_matrix(layer.weight, context, std, grows=grows)
    return cast(nn.Module, layer)


class ReplicatedLinear(ReadsSharedInput):
    """Linear without bias that every tensor-parallel process computes whole, for divided heads."""

    replicated = True

    def __init__(self, context: ParallelContext, d_in: int, d_out: int, std: float):
        super().__init__()
        self.weight = replicated_parameter(context, (d_out, d_in), normal(std))
        hidden_matrix(self.weight, context, std)
        self._context = context

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``[..., d_in]`` from :func:`column_input` to ``[..., d_out]``."""
        shared = project(x, self.weight, id(self))
        if shared is None:
            shared = nn.functional.linear(x, head_shared(self.weight, self._context))
        return shared, None


def group_linear(
    context: ParallelContext, d_in: int, num_groups: int, group_dim: int, std: float, what: str
) -> nn.Module:
    """Linear to ``num_groups`` heads that several heads of a mixer share: divided where every
    process has whole groups, whole on each where there is one group. Raises ValueError otherwise.
    """
    if num_groups % context.tensor_size == 0:
        return column_linear(context, d_in, num_groups * group_dim, std)
    if num_groups == 1:
        return ReplicatedLinear(context, d_in, group_dim, std)
    raise ValueError(
        f"{what} is {num_groups}, expected 1 or a multiple of tensor parallel size "
        f"{context.tensor_size}"
    )


def row_linear(context: ParallelContext, d_in: int, d_out: int, std: float) -> nn.Module:
    """Linear without bias whose inputs are divided; the output is whole (or sequence-divided)."""
    layer = tensor_parallel.RowParallelLinear(
        d_in,
        d_out,
        config=context.megatron,
        init_method=None,
        bias=False,
        input_is_parallel=True,
        skip_bias_add=False,
        tp_group=context.group,
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    hidden_matrix(layer.weight, context, std)
    return layer


def vocab_embedding(context: ParallelContext, vocab_size: int, dim: int, std: float) -> nn.Module:
    """Token embedding divided over the vocabulary."""
    layer = tensor_parallel.VocabParallelEmbedding(
        vocab_size,
        dim,
        init_method=None,
        config=context.megatron,
        reduce_scatter_embeddings=context.megatron.sequence_parallel,
        tp_group=context.group,
    )
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    with_init(layer.weight, normal(std))
    return layer


def column_input(x: Tensor, context: ParallelContext, reader: nn.Module | None = None) -> Tensor:
    """Prepare ``[T, B, d]`` for several :func:`column_linear`: one collective for all of them.

    The gradient's, in the backward pass, runs beside the weights' gradients of the projections that
    ``reader`` has, see :mod:`.shared_input`; without a reader it is waited for.
    """
    if context.tensor_size == 1:
        return x
    sequence_parallel = context.megatron.sequence_parallel
    if not torch.is_grad_enabled():
        if sequence_parallel:
            return tensor_parallel.gather_from_sequence_parallel_region(x, group=context.group)
        return x
    readers: dict[int, ReadsSharedInput] = {}
    for module in () if reader is None else reader.modules():
        if isinstance(module, ReadsSharedInput) and _may_share(module):
            readers[id(module)] = module
    return share_input(
        x,
        {key: module.input_weight() for key, module in readers.items()},
        context.group,
        sequence_parallel=sequence_parallel,
        replicated=[key for key, module in readers.items() if module.replicated],
    )


def head_shared(parameter: Tensor, context: ParallelContext) -> Tensor:
    """A replicated parameter used by divided heads: its gradient is summed over their processes."""
    if context.tensor_size == 1 or not torch.is_grad_enabled():
        return parameter
    return summed_gradient(parameter, context.group)


def sharded_parameter(
    context: ParallelContext,
    shape: tuple[int, ...],
    init: Initializer,
    *,
    dtype: torch.dtype | None = None,
    decay: bool = True,
) -> nn.Parameter:
    """A parameter whose first axis (heads, channels) is divided; ``shape`` is this process's."""
    parameter = nn.Parameter(
        torch.empty(shape, dtype=dtype or context.dtype, device=context.device)
    )
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return with_init(parameter, init, decay=decay)


def replicated_parameter(
    context: ParallelContext, shape: tuple[int, ...], init: Initializer, *, decay: bool = True
) -> nn.Parameter:
    """A parameter that every tensor-parallel process holds whole."""
    parameter = nn.Parameter(torch.empty(shape, dtype=context.dtype, device=context.device))
    return with_init(parameter, init, decay=decay)


# Larger parameters are drawn in pieces, each with a seed of its own: a process draws what it holds.
_WHOLE, _PIECES = 2**20, 64


@torch.no_grad()
def fill_parameters(module: nn.Module, seed: int, *, prefix: str = "") -> None:
    """Give every parameter its values, on this process's device, also where the module was built on
    the meta device; they depend on ``seed`` and the names, which begin with ``prefix``, alone.

    Raises ValueError for a parameter without a recipe.
    """
    for name, owner, key in _places(module):
        parameter: Any = owner._parameters[key]  # carries the attributes of with_init
        if not hasattr(parameter, "init"):
            raise ValueError(f"parameter {name} has no initializer: make it with with_init")
        if parameter.is_meta:
            own = nn.Parameter(
                torch.empty_like(parameter, device=local_device()), parameter.requires_grad
            )
            vars(own).update(vars(parameter))
            owner._parameters[key] = parameter = own
        _fill(parameter, f"{seed}:{prefix}{name}")


def _places(module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for path, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None:
                yield f"{path}.{key}" if path else key, owner, key


@torch.no_grad()
def draw_like(parameter: nn.Parameter, std: float, key: str) -> Tensor:
    """Gaussian values for this process's part of a parameter, float32 on its device; those of the
    whole depend on ``key`` alone."""
    values = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    _draw(values, parameter, Normal(std), key)
    return values


def _fill(parameter: Any, key: str) -> None:
    _draw(parameter, parameter, parameter.init, key)


def _draw(target: Tensor, parameter: Any, init: Initializer, key: str) -> None:
    shape, axis, start = list(parameter.shape), 0, 0
    divided = shard_of(parameter)
    if divided is not None:
        axis, parts, place = divided
        start = place * shape[axis]
        shape[axis] *= parts
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
