"""One input of several projections whose outputs are divided over tensor-parallel processes.

Its gradient is the sum of what all projections on all processes send back. A projection's backward
pass adds to that sum and leaves out the gradient of its weight; the input's own starts the exchange
of the sum between processes, computes the weights' gradients meanwhile, and waits. Of tokens
divided by sequence parallelism only the own ones are kept for that; the others are gathered once
more while the projections' backward passes run. Megatron-LM does this for each linear layer alone
(arXiv 2205.05198, section 4.2.2), with one exchange for each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

_ATTRIBUTE = "shared_input"


@dataclass
class _Gradients:
    """What the projections leave for their input's backward pass. ``weights``: of the outputs, by
    the number of the weight; ``summed``: of which weights over processes; ``gathered``: the whole
    input and whether it has come.
    """

    group: dist.ProcessGroup
    sequence_parallel: bool
    summed: frozenset[int]
    input: Tensor | None = None
    outputs: dict[int, Tensor] = field(default_factory=dict)
    gathered: tuple[Tensor, dist.Work] | None = None

    def gather(self, x: Tensor) -> None:
        """Start to, unless that was done."""
        if self.sequence_parallel and self.gathered is None:
            whole = x.new_empty(x.shape[0] * self.group.size(), *x.shape[1:])
            work = dist.all_gather_into_tensor(
                whole, x.contiguous(), group=self.group, async_op=True
            )
            self.gathered = whole, work

    def whole_input(self, x: Tensor) -> Tensor:
        self.gather(x)
        if self.gathered is None:
            return x
        (whole, work), self.gathered = self.gathered, None
        work.wait()
        return whole


@dataclass
class _Shared:
    """Lies on the input that the projections get: the weights it knows of, by their owner."""

    own: Tensor
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
    """The whole input for :func:`project`; x ``[T, B, d]``, or this process's tokens of it.

    ``weights`` ``[d_out, d]`` by a number of the projection's, whichever may follow: one that does
    not takes no harm, nor does any other use of the result. Gradients of the ``replicated`` ones,
    which every process has whole for outputs that differ, are summed over processes.
    """
    summed = frozenset(number for number, key in enumerate(weights) if key in replicated)
    gradients = _Gradients(group, sequence_parallel, summed)
    whole: Any = _SharedInput.apply(x, gradients, *weights.values())
    numbers = {key: number for number, key in enumerate(weights)}
    setattr(whole, _ATTRIBUTE, _Shared(x.detach(), gradients, numbers))
    return whole


def summed_gradient(parameter: Tensor, group: dist.ProcessGroup) -> Tensor:
    """A parameter that every process has whole, for outputs that differ: its gradient is summed."""
    result: Tensor = _SummedGradient.apply(parameter, group)
    return result


def project(x: Tensor, weight: Tensor, key: int) -> Tensor | None:
    """``x W^T`` ``[..., d_out]`` where x comes from :func:`share_input` and knows this projection's
    ``key``; else None.
    """
    shared: _Shared | None = getattr(x, _ATTRIBUTE, None)
    if shared is None or key not in shared.numbers or not torch.is_grad_enabled():
        return None
    # The weight's gradient is the shared input's to give.
    result: Tensor = _Projection.apply(
        x, weight.detach(), shared.own, shared.gradients, shared.numbers[key]
    )
    return result


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, own: Tensor, gradients: _Gradients, number: int
    ) -> Tensor:
        ctx.save_for_backward(weight, own)
        ctx.gradients, ctx.number = gradients, number
        return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        weight, own = ctx.saved_tensors
        gradients: _Gradients = ctx.gradients
        gradients.gather(own)
        rows = grad.flatten(0, -2)
        if gradients.input is None:
            gradients.input = rows @ weight
        else:
            gradients.input.addmm_(rows, weight)
        gradients.outputs[ctx.number] = rows
        return None, None, None, None, None


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gradients: _Gradients, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gradients, ctx.count = gradients, len(weights)
        ctx.set_materialize_grads(False)
        if gradients.sequence_parallel:
            gradients.gather(x)
            return gradients.whole_input(x)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        gradients: _Gradients = ctx.gradients
        outputs, gradients.outputs = gradients.outputs, {}
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
        if outputs:
            whole = gradients.whole_input(x).flatten(0, -2)
            for number, rows in outputs.items():
                weight_grads[number] = product = rows.t() @ whole
                if number in gradients.summed:
                    sums.append(dist.all_reduce(product, group=gradients.group, async_op=True))
        for work in (exchange, *sums):
            work.wait()
        return result, None, *weight_grads


def _exchange(total: Tensor, gradients: _Gradients) -> tuple[Tensor, dist.Work]:
    """Begin to add up over processes: all of it, or the part of this process's tokens."""
    group = gradients.group
    if not gradients.sequence_parallel:
        return total, dist.all_reduce(total, group=group, async_op=True)
    own = total.new_empty(total.shape[0] // group.size(), *total.shape[1:])
    return own, dist.reduce_scatter_tensor(own, total, group=group, async_op=True)


class _SummedGradient(torch.autograd.Function):
    """As megatron-core's, but right for a gradient that is not contiguous, or that others hold."""

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
