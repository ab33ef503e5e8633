"""Depth-wise LoRA (Relaxed Recursive Transformers, arXiv 2410.20672): every linear layer of a loop
gets, at pass b, a low-rank difference of its own: W x + B_b A_b x. Matrices that are not layers of
their own (recurrent matrices, the block-diagonal gates of ParaRNN, feature maps) stay shared.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

from pretrain.nn.linear import (
    ParallelContext,
    ReadsSharedInput,
    ReplicatedLinear,
    constant,
    head_shared,
    normal,
    used_on_part_of_the_tokens,
    with_init,
)
from pretrain.parallel.shared_input import project


class DepthLoRA(ReadsSharedInput):
    """Wraps a column-parallel, row-parallel or shared linear layer. ``depth`` says which pass is
    going on.

    lora_a ``[passes, rank, d_in]``, lora_b ``[passes, d_out, rank]``; the side that the layer
    divides is divided alike.
    """

    replicated = True  # lora_a, but a row-parallel layer's, whose input is no shared one

    def __init__(self, inner: nn.Module, passes: int, rank: int, context: ParallelContext):
        super().__init__()
        self.inner, self.depth, self._context = inner, 0, context
        self._row = isinstance(inner, RowParallelLinear)
        self._column = isinstance(inner, ColumnParallelLinear)
        d_out, d_in = cast(Tensor, inner.weight).shape
        full_in = d_in * context.tensor_size if self._row else d_in
        empty: Any = {"dtype": context.dtype, "device": context.device}
        self.lora_a = nn.Parameter(torch.empty(passes, rank, d_in, **empty))
        self.lora_b = nn.Parameter(torch.empty(passes, d_out, rank, **empty))
        with_init(self.lora_a, normal(full_in**-0.5))
        with_init(self.lora_b, constant(0.0))
        if self._column:
            set_tensor_model_parallel_attributes(self.lora_b, True, 1, 1)
        elif self._row:
            set_tensor_model_parallel_attributes(self.lora_a, True, 2, 1)
            used_on_part_of_the_tokens(self.lora_b, context)

    @property
    def weight(self) -> nn.Parameter:
        """The wrapped layer's."""
        return cast(nn.Parameter, self.inner.weight)

    def input_weight(self) -> Tensor:
        return self.lora_a[self.depth]

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """As the wrapped layer."""
        y = self.inner(x)[0]
        a, b = self.lora_a[self.depth], self.lora_b[self.depth]
        if not self._row:
            shared = project(x, a, id(self))
            low = nn.functional.linear(x, self._shared(a)) if shared is None else shared
            return y + nn.functional.linear(low, b if self._column else self._shared(b)), None
        low = nn.functional.linear(x, a)
        group = self._context.group
        if self._context.megatron.sequence_parallel:
            low = tensor_parallel.reduce_scatter_to_sequence_parallel_region(low, group=group)
        else:
            low = tensor_parallel.reduce_from_tensor_model_parallel_region(low, group)
        return y + nn.functional.linear(low, b), None

    def _shared(self, parameter: Tensor) -> Tensor:
        return head_shared(parameter, self._context)


_LINEAR = (ColumnParallelLinear, RowParallelLinear, ReplicatedLinear)


def add_depth_lora(block: nn.Module, passes: int, rank: int, context: ParallelContext) -> None:
    """Wrap every linear layer inside ``block``."""
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _LINEAR) and not isinstance(module, DepthLoRA):
                setattr(module, name, DepthLoRA(child, passes, rank, context))


def linear_shapes(block: nn.Module, tensor_size: int) -> list[tuple[int, int]]:
    """(d_in, d_out), undivided, of every layer that :func:`add_depth_lora` would wrap."""
    shapes = []
    for module in block.modules():
        if isinstance(module, _LINEAR):
            d_out, d_in = cast(Tensor, module.weight).shape
            if isinstance(module, RowParallelLinear):
                d_in *= tensor_size
            if isinstance(module, ColumnParallelLinear):
                d_out *= tensor_size
            shapes.append((d_in, d_out))
    return shapes


def set_depth(block: nn.Module, depth: int) -> None:
    """Say which pass the block's low-rank differences are for."""
    for module in block.modules():
        if isinstance(module, DepthLoRA):
            module.depth = depth
