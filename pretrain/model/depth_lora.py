"""Depth-wise LoRA (Relaxed Recursive Transformers, arXiv 2410.20672).

Every linear layer of a loop gets a low-rank difference per pass b: W x + B_b A_b x. Matrices that
are not layers of their own (recurrent matrices, the block-diagonal gates of ParaRNN, feature maps)
stay shared.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from pretrain.nn.linear import (
    ColumnParallelLinear,
    ReadsSharedInput,
    ReplicatedLinear,
    RowParallelLinear,
    head_shared,
    plain_linear,
)
from pretrain.nn.mixers.base import Mixer
from pretrain.nn.parameters import (
    ParameterInfo,
    constant,
    describe,
    info_of,
    normal,
    tensor_shard,
)
from pretrain.parallel.context import ParallelContext
from pretrain.parallel.shared_input import project

Linear = ColumnParallelLinear | RowParallelLinear | ReplicatedLinear


class DepthLoRA(ReadsSharedInput):
    """Wrap a linear layer; ``depth`` says which pass of the loop is running.

    lora_a ``[passes, rank, d_in]``, lora_b ``[passes, d_out, rank]``; the side that the layer
    shards is sharded likewise.
    """

    replicated = True  # lora_a, but a row-parallel layer's, whose input is no shared one

    def __init__(self, inner: Linear, passes: int, rank: int, context: ParallelContext):
        super().__init__()
        self.inner, self.depth, self._context = inner, 0, context
        self._row = isinstance(inner, RowParallelLinear)
        self._column = isinstance(inner, ColumnParallelLinear)
        d_out, d_in = inner.weight.shape
        full_in = d_in * context.tensor_size if self._row else d_in
        a = torch.empty(passes, rank, d_in, dtype=context.dtype, device=context.device)
        b = torch.empty(passes, d_out, rank, dtype=context.dtype, device=context.device)
        inner_info = info_of(inner.weight)
        grows = inner_info.role != "input"
        base_in = full_in / inner_info.width if grows else full_in
        a_info = ParameterInfo(
            normal(base_in**-0.5), role="bottleneck" if grows else "input", width=inner_info.width
        )
        b_info = ParameterInfo(constant(0.0))
        if self._column:
            b_info = dataclasses.replace(b_info, shard=tensor_shard(context, 1))
        elif self._row:
            a_info = dataclasses.replace(a_info, shard=tensor_shard(context, 2))
            b_info = dataclasses.replace(b_info, sum_gradient=context.sequence_parallel)
        self.lora_a = describe(nn.Parameter(a), a_info)
        self.lora_b = describe(nn.Parameter(b), b_info)

    @property
    def weight(self) -> nn.Parameter:  # type: ignore[override]
        """Return the wrapped layer's weight."""
        return self.inner.weight

    def input_weight(self) -> Tensor:
        """Return what this pass's low-rank difference multiplies the input by."""
        return self.lora_a[self.depth]

    def forward(self, x: Tensor) -> Tensor:
        """Add the low-rank difference of this pass to the wrapped layer's output."""
        y = self.inner(x)
        a, b = self.lora_a[self.depth], self.lora_b[self.depth]
        if isinstance(self.inner, RowParallelLinear):
            low = self.inner.reduced(plain_linear(x, a))
            return y + plain_linear(low, b)
        shared = project(x, a, id(self))
        low = plain_linear(x, self._shared(a)) if shared is None else shared
        return y + plain_linear(low, b if self._column else self._shared(b))

    def _shared(self, parameter: Tensor) -> Tensor:
        return head_shared(parameter, self._context)


def add_depth_lora(block: nn.Module, passes: int, rank: int, context: ParallelContext) -> None:
    """Wrap every linear layer inside ``block``."""
    for module in list(block.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear) and not isinstance(module, DepthLoRA):
                setattr(module, name, DepthLoRA(child, passes, rank, context))


def linear_shapes(block: nn.Module) -> list[tuple[int, int]]:
    """Return (d_in, d_out) of every layer of an unsharded block that would be wrapped."""
    layers = [module for module in block.modules() if isinstance(module, Linear)]
    return [(layer.weight.shape[1], layer.weight.shape[0]) for layer in layers]


def set_depth(block: nn.Module, depth: int) -> None:
    """Tell a block which pass of a loop runs: its low-rank differences, and its mixer."""
    for module in block.modules():
        if isinstance(module, DepthLoRA | Mixer):
            module.depth = depth
