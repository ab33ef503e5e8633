"""The classical cells step by step with a backward pass that keeps few of the states."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.ops.rnn.cells import Cell
from pretrain.ops.rnn.definition import recurrent_product
from pretrain.ops.shared.checkpointed_recurrence import Recurrence, States, Steps, previous_rows


class CheckpointedRNN(Recurrence):
    """A classical cell as a :class:`Recurrence` of blocks of time steps.

    Rows are x with its biases; the parameters are the recurrent weight ``[H, D, G D]``.
    """

    states_per_step = 4

    def __init__(self, kind: Cell, state_grad_clip: float | None):
        self._kind, self._clip = kind, state_grad_clip

    @override
    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        (x,), (weight,) = rows, parameters
        output = states[0].new_empty(x.shape[0], *states[0].shape[1:])
        final, running = tuple(s.clone() for s in states), states
        for first, count in steps:
            running = _shrink(final, running, count)
            part = slice(first, first + count)
            running = self._kind.step(x[part], recurrent_product(running[0], weight), running)
            output[part] = running[0]
        _shrink(final, running, 0)
        return output, final

    @override
    def backward(
        self,
        rows: Sequence[Tensor],
        parameters: Sequence[Tensor],
        states: States,
        steps: Steps,
        d_output: Tensor,
        d_states: States,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], States]:
        (x,), (weight,) = rows, parameters
        # Each step's pointwise part becomes a small graph of its own; the matrix products are done
        # by hand, those of the weight's gradient for the whole block at once.
        graphs, running = [], states
        history = states[0].new_empty(len(states[0]) + x.shape[0], *states[0].shape[1:])
        history[: len(states[0])] = states[0]
        for first, count in steps:
            with torch.no_grad():
                product = recurrent_product(running[0][:count], weight)
            leaves = [
                t.detach().requires_grad_()
                for t in (x[first : first + count], product, *(s[:count] for s in running))
            ]
            with torch.enable_grad():
                new = self._kind.step(leaves[0], leaves[1], tuple(leaves[2:]))
            graphs.append((leaves, new))
            running = tuple(s.detach() for s in new)
            history[len(states[0]) + first :][:count] = running[0]

        d_x, back = torch.empty_like(x), weight.mT
        d_products = weight.new_empty(x.shape[0], weight.shape[0], weight.shape[2])
        for (first, count), (leaves, new) in zip(reversed(steps), reversed(graphs), strict=True):
            part = slice(first, first + count)
            carried = [d[:count] for d in d_states]
            if self._clip is not None:
                carried = [d.clamp_(-self._clip, self._clip) for d in carried]
            carried[0] = carried[0] + d_output[part]
            d_x[part], d_product, *d_before = torch.autograd.grad(
                new, leaves, carried, allow_unused=True, materialize_grads=True
            )
            d_products[part] = d_product.permute(0, 2, 1, 3).flatten(2)
            through = torch.bmm(d_products[part].transpose(0, 1), back).transpose(0, 1)
            d_before[0] = d_before[0] + through
            for total, new_part in zip(d_states, d_before, strict=True):
                total[:count] = new_part
        previous = previous_rows(history, len(states[0]), steps)
        d_weight = previous.permute(1, 2, 0) @ d_products.transpose(0, 1)
        return (d_x,), (d_weight,), d_states


def _shrink(final: States, running: States, count: int) -> States:
    """Store the states of sequences that have ended, and return those of the first ``count``."""
    size = len(running[0])
    if count < size:
        for total, part in zip(final, running, strict=True):
            total[count:size] = part[count:]
    return tuple(s[:count] for s in running)
