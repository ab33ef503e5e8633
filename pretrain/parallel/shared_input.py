"""The shared input of several projections whose outputs are sharded over tensor-parallel ranks.

Its gradient is the sum of what all projections on all ranks send back. A projection's backward pass
adds to that sum and skips the gradient of its weight; the input's backward pass starts the
reduction of the sum over ranks, computes the weights' gradients meanwhile, and waits. Of tokens
sharded by sequence parallelism only the local ones are kept for that; the others are gathered once
more while the projections' backward passes run. Megatron-LM does this for each linear layer alone
(arXiv 2205.05198, section 4.2.2), with one reduction for each.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.ops import float8

_ATTRIBUTE = "shared_input"


@dataclass
class _Gradients:
    """The tensors that the projections leave for their input's backward pass.

    Attributes:
        group: the tensor-parallel ranks.
        sequence_parallel: whether they shard the input's tokens.
        summed: numbers of the weights whose gradients are summed over ranks.
        input: sum of the input's gradients so far.
        weights: what gives the weights' gradients from the full input, by their numbers.
        gathered: the full input and the handle of its all-gather, if that was started.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool
    summed: frozenset[int]
    input: Tensor | None = None
    weights: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    gathered: tuple[Tensor, dist.Work] | None = None

    def gather(self, x: Tensor) -> None:
        """Start the all-gather unless it is already running."""
        if self.sequence_parallel and self.gathered is None:
            full = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
            work = dist.all_gather_into_tensor(
                full, x.contiguous(), group=self.group, async_op=True
            )
            self.gathered = full, work

    def full_input(self, x: Tensor) -> Tensor:
        self.gather(x)
        if self.gathered is None:
            return x
        (full, work), self.gathered = self.gathered, None
        work.wait()
        return full


@dataclass
class _Shared:
    """The mark on the input that projections get: the numbers of its weights, by their key."""

    local: Tensor
    gradients: _Gradients
    numbers: dict[int, int]


def share_input(
    x: Tensor,
    weights: Mapping[int, Tensor],
    group: dist.ProcessGroup,
    *,
    sequence_parallel: bool,
    replicated: Collection[int] = (),
) -> Tensor:
    """Return the full input for :func:`project` of x ``[T, B, d]`` or this rank's tokens of it.

    ``weights`` ``[d_out, d]`` are keyed by their projections. Not all of them must be used, and the
    result may have other uses. Gradients of the ``replicated`` ones, which every rank has in full
    for outputs that differ, are summed over ranks.
    """
    summed = frozenset(number for number, key in enumerate(weights) if key in replicated)
    gradients = _Gradients(group, sequence_parallel, summed)
    full: Any = _SharedInput.apply(x, gradients, *weights.values())
    numbers = {key: number for number, key in enumerate(weights)}
    setattr(full, _ATTRIBUTE, _Shared(x.detach(), gradients, numbers))
    return full


def summed_gradient(parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return a replicated parameter used for outputs that differ; its gradient is all-reduced."""
    result: Tensor = _SummedGradient.apply(parameter, group)
    return result


def project(x: Tensor, weight: Tensor, key: int, how: float8.Float8 | None = None) -> Tensor | None:
    """Return ``x W^T`` ``[..., d_out]`` if x comes from :func:`share_input` and knows ``key``.

    Otherwise return None. ``how``: the sharding of a layer that multiplies in float8.
    """
    shared: _Shared | None = getattr(x, _ATTRIBUTE, None)
    if shared is None or key not in shared.numbers or not torch.is_grad_enabled():
        return None
    # The weight's gradient is the shared input's to give.
    result: Tensor = _Projection.apply(
        x, weight.detach(), shared.local, shared.gradients, shared.numbers[key], how
    )
    return result


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        local: Tensor,
        gradients: _Gradients,
        number: int,
        how: float8.Float8 | None,
    ) -> Tensor:
        ctx.gradients, ctx.number, ctx.how = gradients, number, how
        if how is None:
            ctx.save_for_backward(weight, local)
            return x @ weight.t()
        y, *scales = float8.output(x, weight, how)
        ctx.save_for_backward(weight, local, *scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        weight, local, *scales = ctx.saved_tensors
        gradients: _Gradients = ctx.gradients
        if ctx.how is not None:
            # The ranks agree on its scale before they wait for tokens.
            float8_rows = float8.cast_gradient(grad, ctx.how)
        gradients.gather(local)
        if ctx.how is None:
            rows = grad.flatten(0, -2)
            if gradients.input is None:
                gradients.input = rows @ weight
            else:
                gradients.input.addmm_(rows, weight)
            gradients.weights[ctx.number] = partial(torch.mm, rows.t())
            return None, None, None, None, None, None
        x_scale, weight_scale = scales
        d_x = float8.input_gradient(float8_rows, weight, weight_scale)
        gradients.input = d_x if gradients.input is None else gradients.input.add_(d_x)
        gradients.weights[ctx.number] = partial(float8.weight_gradient, float8_rows, scale=x_scale)
        return None, None, None, None, None, None


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: _Gradients, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradients, ctx.count = gradients, len(weights)
        ctx.set_materialize_grads(False)
        if gradients.sequence_parallel:
            gradients.gather(x)
            return gradients.full_input(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradients: _Gradients = ctx.gradients
        weights, gradients.weights = gradients.weights, {}
        total, gradients.input = gradients.input, None
        weight_grads: list[Tensor | None] = [None] * ctx.count
        if total is None and grad is None:
            return None, None, *weight_grads
        if total is None:
            assert grad is not None
            # Others may hold it too, and exchanges want it in order.
            total = grad.flatten(0, -2).clone(memory_format=torch.contiguous_format)
        elif grad is not None:
            total += grad.flatten(0, -2)
        total = total.view(-1, *x.shape[1:])
        result, exchange = _exchange(total, gradients)
        sums = []
        if weights:
            full = gradients.full_input(x).flatten(0, -2)
            for number, gradient in weights.items():
                weight_grads[number] = product = gradient(full)
                if number in gradients.summed:
                    sums.append(dist.all_reduce(product, group=gradients.group, async_op=True))
        for work in (exchange, *sums):
            work.wait()
        return result, None, *weight_grads


def _exchange(total: Tensor, gradients: _Gradients) -> tuple[Tensor, dist.Work]:
    """Start the reduction over ranks: of all tokens, or scattered to this rank's tokens."""
    group = gradients.group
    if not gradients.sequence_parallel:
        return total, dist.all_reduce(total, group=group, async_op=True)
    local = total.new_empty(total.shape[0] // group.size(), *total.shape[1:])
    return local, dist.reduce_scatter_tensor(local, total, group=group, async_op=True)


class _SummedGradient(torch.autograd.Function):
    """A sum of gradients like megatron-core's, also right for one that is strided or shared."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return parameter.view_as(parameter)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
