"""Tensor-parallel layers, and one way to initialise parameters whatever the layout.

The layers are megatron-core's, made without initialisation; each parameter carries the recipe of
its values instead (:func:`with_init`). :func:`initialize_parameters` draws every *full* tensor from
a generator seeded by the parameter's name and keeps this process's slice, so a model is the same
under any tensor-parallel layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

Initializer = Callable[[tuple[int, ...], torch.Generator], Tensor]


@dataclass(frozen=True)
class ParallelContext:
    """What a layer needs to know of its surroundings.

    megatron:  megatron-core's model-parallel settings
    dtype:     dtype of weights and activations
    """

    megatron: TransformerConfig
    dtype: torch.dtype

    @property
    def group(self) -> dist.ProcessGroup:
        """The tensor-parallel process group."""
        return parallel_state.get_tensor_model_parallel_group()

    @property
    def tensor_size(self) -> int:
        return self.megatron.tensor_model_parallel_size

    @property
    def device(self) -> torch.device:
        if self.megatron.use_cpu_initialization:
            return torch.get_default_device()
        return torch.device("cuda", torch.cuda.current_device())

    def local(self, count: int, what: str) -> int:
        """This process's share of ``count`` heads or channels. Raises ValueError if uneven."""
        if count % self.tensor_size:
            raise ValueError(
                f"{what} is {count}, which tensor parallel size {self.tensor_size} does not divide"
            )
        return count // self.tensor_size


def normal(std: float) -> Initializer:
    """Gaussian with mean 0."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std


def constant(value: float) -> Initializer:
    """One value everywhere."""
    return lambda shape, generator: torch.full(shape, value)


def with_init(parameter: nn.Parameter, init: Initializer, *, decay: bool = True) -> nn.Parameter:
    """Attach the recipe of a parameter's values, and whether weight decay may apply to it."""
    tagged: Any = parameter
    tagged.init = init
    tagged.decay = decay and parameter.ndim > 1
    return parameter


def used_on_part_of_the_tokens(parameter: nn.Parameter, context: ParallelContext) -> nn.Parameter:
    """Mark a replicated parameter that, under sequence parallelism, each process applies to tokens
    of its own: megatron-core then sums its gradient over them."""
    tagged: Any = parameter
    tagged.sequence_parallel = context.megatron.sequence_parallel
    return parameter


def column_linear(context: ParallelContext, d_in: int, d_out: int, std: float) -> nn.Module:
    """Linear without bias whose outputs are divided; its input comes from :func:`column_input`."""
    layer = tensor_parallel.ColumnParallelLinear(
        d_in, d_out, config=context.megatron, init_method=None, bias=False, gather_output=False,
        disable_grad_reduce=True, tp_group=context.group,
    )  # fmt: skip
    layer.sequence_parallel = False  # column_input has gathered already, once for all projections
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    with_init(layer.weight, normal(std))
    return layer


class SharedLinear(nn.Module):
    """Linear without bias that every tensor-parallel process computes whole, for divided heads."""

    def __init__(self, context: ParallelContext, d_in: int, d_out: int, std: float):
        super().__init__()
        self.weight = replicated_parameter(context, (d_out, d_in), normal(std))
        self._context = context

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """``[..., d_in]`` from :func:`column_input` to ``[..., d_out]``."""
        return nn.functional.linear(x, head_shared(self.weight, self._context)), None


def group_linear(
    context: ParallelContext, d_in: int, num_groups: int, group_dim: int, std: float, what: str
) -> nn.Module:
    """Linear to ``num_groups`` heads that several heads of a mixer share: divided where every
    process has whole groups, whole on each where there is one group. Raises ValueError otherwise.
    """
    if num_groups % context.tensor_size == 0:
        return column_linear(context, d_in, num_groups * group_dim, std)
    if num_groups == 1:
        return SharedLinear(context, d_in, group_dim, std)
    raise ValueError(
        f"{what} is {num_groups}, expected 1 or a multiple of tensor parallel size "
        f"{context.tensor_size}"
    )


def row_linear(context: ParallelContext, d_in: int, d_out: int, std: float) -> nn.Module:
    """Linear without bias whose inputs are divided; the output is whole (or sequence-divided)."""
    layer = tensor_parallel.RowParallelLinear(
        d_in, d_out, config=context.megatron, init_method=None, bias=False, input_is_parallel=True,
        skip_bias_add=False, tp_group=context.group,
    )  # fmt: skip
    set_tensor_model_parallel_attributes(layer.weight, True, 1, 1)
    with_init(layer.weight, normal(std))
    return layer


def vocab_embedding(context: ParallelContext, vocab_size: int, dim: int, std: float) -> nn.Module:
    """Token embedding divided over the vocabulary."""
    layer = tensor_parallel.VocabParallelEmbedding(
        vocab_size, dim, init_method=None, config=context.megatron,
        reduce_scatter_embeddings=context.megatron.sequence_parallel, tp_group=context.group,
    )  # fmt: skip
    set_tensor_model_parallel_attributes(layer.weight, True, 0, 1)
    with_init(layer.weight, normal(std))
    return layer


def column_input(x: Tensor, context: ParallelContext) -> Tensor:
    """Prepare ``[T, B, d]`` for several :func:`column_linear`: one collective for all of them."""
    if context.megatron.sequence_parallel:
        return tensor_parallel.gather_from_sequence_parallel_region(x, group=context.group)
    return tensor_parallel.copy_to_tensor_model_parallel_region(x, group=context.group)


def head_shared(parameter: Tensor, context: ParallelContext) -> Tensor:
    """A replicated parameter used by divided heads: its gradient is summed over their processes."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(parameter, group=context.group)


def divided_parameter(
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


@torch.no_grad()
def initialize_parameters(model: nn.Module, seed: int) -> None:
    """Fill every parameter; the result depends on ``seed`` and the parameters' names alone.

    Raises ValueError for a parameter without a recipe.
    """
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    parameter: Any  # carries the attributes of with_init and of megatron-core
    for name, parameter in model.named_parameters():
        if not hasattr(parameter, "init"):
            raise ValueError(f"parameter {name} has no initializer: make it with with_init")
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        shape = list(parameter.shape)
        divided = getattr(parameter, "tensor_model_parallel", False)
        if divided:
            axis = parameter.partition_dim
            shape[axis] *= size
        full = parameter.init(tuple(shape), generator)
        if divided:
            full = full.chunk(size, axis)[rank]
        parameter.copy_(full)
