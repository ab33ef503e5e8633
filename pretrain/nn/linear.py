"""Linear layers and the embedding under tensor parallelism (arXiv 1909.08053).

``column_input`` prepares the input of several column-parallel projections; ``row_linear`` ends a
layer. On one process they are plain linear layers. Layers return their output alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.nn.maximal_update import Role
from pretrain.nn.parameters import (
    ParameterInfo,
    describe,
    matrix_parameter,
    normal,
    tensor_shard,
)
from pretrain.ops.float8 import Float8, float8_linear
from pretrain.parallel.collectives import (
    gather_sequence,
    reduce_from_tensor_parallel,
    reduce_scatter_sequence,
)
from pretrain.parallel.context import ParallelContext
from pretrain.parallel.shared_input import project, share_input, summed_gradient


class ReadsSharedInput(nn.Module):
    """A projection that multiplies its input by :func:`project`, with ``id(self)`` as its key."""

    replicated = False  # whether every rank holds the full weight
    weight: nn.Parameter

    def input_weight(self) -> Tensor:
        """Return what the input is multiplied by, for the shared input to give its gradient to."""
        return self.weight


class ColumnParallelLinear(ReadsSharedInput):
    """Map ``[..., d_in]`` to this rank's outputs ``[..., d_out / size]``, without bias.

    ``precise``: whether it stays in the model's dtype where projections multiply in float8, as set
    in ``float8``: what decides on decays and other gates is small, and errors in it add up.
    ``d_in``, ``d_out``: widths of the full layer.
    """

    float8: Float8 | None = None

    def __init__(
        self,
        context: ParallelContext,
        d_in: int,
        d_out: int,
        std: float,
        *,
        role: Role = "hidden",
        precise: bool = False,
    ):
        super().__init__()
        self.d_in, self.d_out, self.precise = d_in, d_out, precise
        rows = context.local(d_out, "the number of outputs")
        self.weight = matrix_parameter(context, (rows, d_in), std, 0, role=role)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply x ``[..., d_in]``, which comes from :func:`column_input`."""
        shared = project(x, self.weight, id(self), self.float8)
        return _multiply(x, self.weight, self.float8) if shared is None else shared


class ReplicatedLinear(ReadsSharedInput):
    """Linear without bias that every tensor-parallel rank computes in full, for sharded heads."""

    replicated = True

    def __init__(
        self,
        context: ParallelContext,
        d_in: int,
        d_out: int,
        std: float,
        *,
        role: Role = "bottleneck",
    ):
        super().__init__()
        self.weight = matrix_parameter(context, (d_out, d_in), std, None, role=role)
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., d_in]`` from :func:`column_input` to ``[..., d_out]``."""
        shared = project(x, self.weight, id(self))
        if shared is not None:
            return shared
        return plain_linear(x, head_shared(self.weight, self._context))


class RowParallelLinear(nn.Module):
    """Map this rank's inputs ``[T, B, d_in / size]`` to the full ``[T, B, d_out]``, without bias.

    The sum over ranks is all-reduced, or with sequence parallelism reduce-scattered over tokens.
    """

    float8: Float8 | None = None
    precise = False

    def __init__(self, context: ParallelContext, d_in: int, d_out: int, std: float):
        super().__init__()
        self.d_in, self.d_out = d_in, d_out
        columns = context.local(d_in, "the number of inputs")
        self.weight = matrix_parameter(context, (d_out, columns), std, 1)
        self._context = context

    def forward(self, x: Tensor) -> Tensor:
        """Multiply, and sum over the tensor-parallel ranks."""
        return self.reduced(_multiply(x, self.weight, self.float8))

    def reduced(self, y: Tensor) -> Tensor:
        """Sum partial outputs ``[T, B, d_out]`` over the ranks."""
        if self._context.sequence_parallel:
            return reduce_scatter_sequence(y, self._context.group)
        return reduce_from_tensor_parallel(y, self._context.group)


class VocabParallelEmbedding(nn.Module):
    """Look tokens up in a table whose rows are sharded over the tensor-parallel ranks."""

    def __init__(self, context: ParallelContext, vocab_size: int, dim: int, std: float):
        super().__init__()
        rows = context.local(vocab_size, "the vocabulary")
        weight = torch.empty(rows, dim, dtype=context.dtype, device=context.device)
        info = ParameterInfo(normal(std), shard=tensor_shard(context, 0))
        self.weight = describe(nn.Parameter(weight), info)
        self._context = context

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens ``[B, T]`` to ``[T, B, d]``, with sequence parallelism to this rank's T."""
        if self._context.tensor_size == 1:
            return F.embedding(tokens, self.weight).transpose(0, 1)
        rows = len(self.weight)
        local = tokens - self._context.tensor_rank * rows
        elsewhere = (local < 0) | (local >= rows)
        x = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        x = x.masked_fill(elsewhere[..., None], 0.0).transpose(0, 1)
        if self._context.sequence_parallel:
            return reduce_scatter_sequence(x, self._context.group)
        return reduce_from_tensor_parallel(x, self._context.group)


def _multiply(x: Tensor, weight: Tensor, how: Float8 | None) -> Tensor:
    return plain_linear(x, weight) if how is None else float8_linear(x, weight, how)


def plain_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x W^T`` by one product of matrices.

    Without gradients matmul would take a transposed x ``[T, B, d]`` as T matrices, which is slower
    and rounds otherwise: a teacher would differ from a student of the same weights.
    """
    rows = F.linear(x.reshape(-1, x.shape[-1]), weight)
    return rows.view(*x.shape[:-1], weight.shape[0])


def column_linear(
    context: ParallelContext,
    d_in: int,
    d_out: int,
    std: float,
    *,
    role: Role = "hidden",
    precise: bool = False,
) -> ColumnParallelLinear:
    """Make a linear layer without bias whose outputs are sharded.

    Its input comes from :func:`column_input`. ``role``: which of d_in and d_out grow with the
    model. ``precise``: whether it is never computed in float8, as gates' and decays' are not.
    Raises ValueError where the outputs do not divide.
    """
    return ColumnParallelLinear(context, d_in, d_out, std, role=role, precise=precise)


def group_linear(
    context: ParallelContext,
    d_in: int,
    num_groups: int,
    group_dim: int,
    std: float,
    what: str,
    *,
    role: Role = "bottleneck",
) -> ReadsSharedInput:
    """Make a linear layer to ``num_groups`` heads that several heads of a mixer share.

    It is sharded where every rank has whole groups and replicated where there is one group, which
    is too narrow for float8 to gain much, and whose gradient each rank has a part of.
    ``role``: ``hidden`` where the groups become more with the model. Raises ValueError otherwise,
    naming ``what``.
    """
    if num_groups % context.tensor_size == 0:
        d_out, precise = num_groups * group_dim, num_groups == 1
        return column_linear(context, d_in, d_out, std, role=role, precise=precise)
    if num_groups == 1:
        return ReplicatedLinear(context, d_in, group_dim, std, role=role)
    raise ValueError(
        f"{what} is {num_groups}, expected 1 or a multiple of tensor parallel size "
        f"{context.tensor_size}"
    )


def row_linear(context: ParallelContext, d_in: int, d_out: int, std: float) -> RowParallelLinear:
    """Make a linear layer without bias whose inputs are sharded and whose output is summed."""
    return RowParallelLinear(context, d_in, d_out, std)


def _may_share(projection: ReadsSharedInput) -> bool:
    """Return whether the shared input may give a projection its gradient.

    DeepSpeed's ZeRO-3 frees weights again after the layer that uses them.
    """
    weight = projection.weight
    return weight.requires_grad and not hasattr(weight, "ds_id")


def column_input(x: Tensor, context: ParallelContext, reader: nn.Module | None = None) -> Tensor:
    """Prepare ``[T, B, d]`` for several :func:`column_linear`, with one collective for all of them.

    In the backward pass the gradient's collective runs alongside the weight gradients of the
    projections inside ``reader``, see :mod:`pretrain.parallel.shared_input`; without a reader it is
    waited for.
    """
    if context.group is None:
        return x
    if not torch.is_grad_enabled():
        return gather_sequence(x, context.group) if context.sequence_parallel else x
    readers: dict[int, ReadsSharedInput] = {}
    for module in () if reader is None else reader.modules():
        if isinstance(module, ReadsSharedInput) and _may_share(module):
            readers[id(module)] = module
    return share_input(
        x,
        {key: module.input_weight() for key, module in readers.items()},
        context.group,
        sequence_parallel=context.sequence_parallel,
        replicated=[key for key, module in readers.items() if module.replicated],
    )


def head_shared(parameter: Tensor, context: ParallelContext) -> Tensor:
    """Return a replicated parameter that sharded heads use: its gradient is summed over ranks."""
    if context.group is None or not torch.is_grad_enabled():
        return parameter
    return summed_gradient(parameter, context.group)
