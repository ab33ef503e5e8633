"""Linear layers whose three matrix products are in float8, by torchao's tensors.

Each operand has one scale, from its largest element at the time: torchao's ``tensorwise`` recipe,
with activations and weights in e4m3 and gradients in e5m2. It is the fastest of the recipes, an
operand is cast with the same scale for all its products, and what tensor-parallel ranks need to
agree on is one number for each operand that they shard. A scale per row is more accurate for
outliers, but has other scales for each product, and its sums over ranks need vectors of them.

A sharded operand is scaled by the largest element on all ranks, so that every element becomes the
same float8 number as on one process. On a CPU torchao multiplies the float8 numbers in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.float8.requirements import float8_tensors
from pretrain.ops.shared.planning import Work, nbytes, observe

Role = Literal["INPUT", "WEIGHT", "GRAD_OUTPUT"]
_DTYPES: dict[Role, torch.dtype] = {
    "INPUT": torch.float8_e4m3fn,
    "WEIGHT": torch.float8_e4m3fn,
    "GRAD_OUTPUT": torch.float8_e5m2,
}
_TINY = 1e-12  # torchao's: the largest element counts as no less


@dataclass(frozen=True)
class Float8:
    """The sharding of a layer that multiplies in float8.

    Attributes:
        sharded: Side of the weight that tensor-parallel ranks shard.
        group: These ranks; None where there is one.
    """

    sharded: Literal["inputs", "outputs"]
    group: dist.ProcessGroup | None = None


class Operand(NamedTuple):
    """A matrix in float8, which stands for ``data / scale``."""

    data: Tensor
    scale: Tensor
    role: Role
    dtype: torch.dtype  # of the matrix before, and of products

    def t(self) -> Operand:
        """Return the transpose."""
        return self._replace(data=self.data.t())


def float8_linear(x: Tensor, weight: Tensor, how: Float8) -> Tensor:
    """Return ``x W^T`` of x ``[..., d_in]`` and weight ``[d_out, d_in]``, both of one dtype."""
    result: Tensor = _Linear.apply(x, weight, how)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Float8) -> Tensor:
        y, x_scale, weight_scale = output(x, weight, how)
        ctx.save_for_backward(x, weight, x_scale, weight_scale)
        ctx.how = how
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, x_scale, weight_scale = ctx.saved_tensors
        rows, d_x, d_weight = cast_gradient(grad, ctx.how), None, None
        if ctx.needs_input_grad[0]:
            d_x = input_gradient(rows, weight, weight_scale).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = weight_gradient(rows, x, x_scale)
        return d_x, d_weight, None


def output(x: Tensor, weight: Tensor, how: Float8) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``x W^T`` and the scales of x and of the weight, for the backward pass."""
    largest = torch.stack([_largest(x), _largest(weight)])
    # Where outputs are sharded, every rank has all of x.
    _agree(largest if how.sharded == "inputs" else largest[1:], how)
    x_scale, weight_scale = _scale(largest, _DTYPES["INPUT"]).unbind()
    y = _product(_cast(x, x_scale, "INPUT"), _cast(weight, weight_scale, "WEIGHT").t())
    return y.view(*x.shape[:-1], len(weight)), x_scale, weight_scale


def cast_gradient(grad: Tensor, how: Float8) -> Operand:
    """Return the gradient of an output ``[..., d_out]`` as a float8 matrix of its rows."""
    largest = _largest(grad)[None]
    if how.sharded == "outputs":
        _agree(largest, how)
    return _cast(grad, _scale(largest, _DTYPES["GRAD_OUTPUT"])[0], "GRAD_OUTPUT")


def input_gradient(rows: Operand, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the input's rows, given the output's and the weight's scale."""
    return _product(rows, _cast(weight, scale, "WEIGHT", by_columns=True))


def weight_gradient(rows: Operand, x: Tensor, scale: Tensor) -> Tensor:
    """Return the gradient of the weight, given the output's, the input and its scale."""
    return _product(rows.t(), _cast(x, scale, "INPUT", by_columns=True))


def _agree(largest: Tensor, how: Float8) -> None:
    """Replace the numbers by the largest ones of all ranks, in place."""
    if how.group is not None:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=how.group)


def _cast(x: Tensor, scale: Tensor, role: Role, *, by_columns: bool = False) -> Operand:
    """Return x as a matrix, ``by_columns`` if a product wants it to lie in memory like that."""
    rows = x.flatten(0, -2)
    if by_columns:
        data = _to_float8_by_columns(rows, scale, _DTYPES[role])
    else:
        data = _to_float8(rows, scale, _DTYPES[role])
    return Operand(data, scale, role, x.dtype)


@fused
def _largest(x: Tensor) -> Tensor:
    return x.abs().amax().float()


@fused
def _scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return torchao's scales, divided in float64 whether compiled or not."""
    return (torch.finfo(dtype).max / largest.double().clamp_min(_TINY)).float()


@fused
def _to_float8(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype)


@fused
def _to_float8_by_columns(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    most = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-most, most).to(dtype).t().contiguous().t()


def _product(a: Operand, b: Operand) -> Tensor:
    """Return the product in the operands' former dtype."""
    if a.data.is_meta:
        return _planned_product(a, b)
    result: Tensor = torch.mm(_tensor(a), _tensor(b))
    return result


def _tensor(x: Operand) -> Tensor:
    torchao, emulate = float8_tensors(), not x.data.is_cuda
    # Quick sums in the forward pass alone, as torchao's recipes have it.
    quick = torchao.ScaledMMConfig(emulate=emulate, use_fast_accum=True)
    exact = torchao.ScaledMMConfig(emulate=emulate)
    config = torchao.LinearMMConfig(output=quick, grad_input=exact, grad_weight=exact)
    role = torchao.GemmInputRole[x.role]
    made: Tensor = torchao.Float8TrainingTensor(x.data, x.scale, x.dtype, config, role)
    return made


def _planned_product(a: Operand, b: Operand) -> Tensor:
    """Return what the product would be, of operands in the layout that the kernel wants."""
    rows, columns = a.data.contiguous(), b.data.t().contiguous()
    y = torch.empty(len(rows), len(columns), dtype=a.dtype, device="meta")
    flops = 2.0 * y.numel() * rows.shape[1]
    observe(Work(flops, kind="product"), nbytes((rows, columns, y)), rows.dtype)
    return y
