"""Recurrences that only time can unroll, with a backward pass that is linear in time.

It keeps only the state of every c-th step. All sequences advance together. Rows of tokens are
ordered by time step, longest sequence first, so that the sequences still running are a prefix
(``torch.nn.utils.rnn.PackedSequence``). Backward goes through blocks of c steps from the last to
the first, each recomputed from its starting state.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences

Steps = Sequence[tuple[int, int]]  # (first row, number of rows) of each time step of a block
States = tuple[Tensor, ...]


class Recurrence(Protocol):
    """A recurrence over a block of time steps, forward and backward.

    Rows are ``[R, ...]``; states ``[N, ...]``, of the sequences that run at the block's first step;
    all steps share ``parameters``. Either pass calls a copy of the object, which may keep buffers
    from one block to the next.

    Attributes:
        states_per_step: States that the backward pass of a block stores for each of its steps.
    """

    states_per_step: int

    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        """Return the outputs ``[R, ...]`` and the states after each sequence's last row."""

    def backward(
        self,
        rows: Sequence[Tensor],
        parameters: Sequence[Tensor],
        states: States,
        steps: Steps,
        d_output: Tensor,
        d_states: States,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], States]:
        """Return the gradients of the rows, the parameters and the starting states."""


def checkpointed_recurrence(
    recurrence: Recurrence,
    rows: Sequence[Tensor],
    parameters: Sequence[Tensor],
    states: Sequence[Tensor],
    sequences: Sequences,
    checkpoint_every: int | None,
) -> tuple[Tensor, States]:
    """Run ``recurrence`` over rows ``[T, ...]`` of packed tokens in order, states ``[N, ...]``.

    Returns its outputs ``[T, ...]`` and the final states. ``checkpoint_every``: time steps per
    block, by default about sqrt(T / n), n the states per step of a block, which keeps fewest states
    at once, but at most 32: larger blocks exceed a CPU's cache. Raises ValueError where it is less
    than 1.
    """
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"checkpoint_every is {checkpoint_every}, expected at least 1")
    layout = sequences.chunk_layout(1)
    order, index = layout.order, layout.token_index[:, 0]
    block = checkpoint_every or min(
        32, max(8, math.isqrt(len(layout.steps) // recurrence.states_per_step))
    )
    alone = len(order) == 1  # a single sequence is in order as it is
    output, *final = _CheckpointedRecurrence.apply(
        recurrence,
        layout.steps,
        block,
        len(rows),
        len(parameters),
        *(rows if alone else (x.index_select(0, index) for x in rows)),
        *parameters,
        *(states if alone else (s[order] for s in states)),
    )
    if alone:
        return output, tuple(final)
    back = torch.argsort(order)
    return output.index_select(0, layout.token_slot), tuple(s[back] for s in final)


def previous_rows(buffer: Tensor, num_states: int, steps: Steps) -> Tensor:
    """Return the state that each row came from.

    ``buffer`` holds ``num_states`` starting states and then every row's own state.
    """
    rows = buffer.shape[0] - num_states
    counts = [num_states, *(count for _, count in steps)]
    if counts[-1] == num_states:
        return buffer[:rows]
    index = torch.cat(
        [
            torch.arange(first, first + count) + num_states - before
            for (first, count), before in zip(steps, counts, strict=False)
        ]
    )
    return buffer[index.to(buffer.device)]


class _CheckpointedRecurrence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recurrence: Recurrence,
        steps: Steps,
        block: int,
        num_rows: int,
        num_parameters: int,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, parameters = tensors[:num_rows], tensors[num_rows : num_rows + num_parameters]
        states = tuple(s.clone() for s in tensors[num_rows + num_parameters :])
        blocks, kept, output = _blocks(steps, block), [], None
        ctx.recurrence, recurrence = recurrence, copy.copy(recurrence)
        for part, inner in blocks:
            count = inner[0][1]
            start = tuple(s[:count].clone() for s in states)
            kept.append(start)
            piece, final = recurrence.forward([x[part] for x in rows], parameters, start, inner)
            if output is None:
                output = piece.new_empty(rows[0].shape[0], *piece.shape[1:])
            output[part] = piece
            for state, new in zip(states, final, strict=True):
                state[:count] = new
        if output is None:
            output, _ = recurrence.forward(rows, parameters, tuple(s[:0] for s in states), [])
        ctx.blocks, ctx.counts = blocks, (num_rows, num_parameters)
        ctx.num_states = len(states)
        ctx.save_for_backward(*rows, *parameters, *(s for start in kept for s in start))
        return output, *states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, *d_final: Tensor) -> tuple[Tensor | None, ...]:
        num_rows, num_parameters = ctx.counts
        saved = ctx.saved_tensors
        rows, parameters = saved[:num_rows], saved[num_rows : num_rows + num_parameters]
        kept = saved[num_rows + num_parameters :]
        d_rows = [torch.zeros_like(x) for x in rows]
        d_parameters = [torch.zeros_like(p) for p in parameters]
        d_states = tuple(d.clone() for d in d_final)
        recurrence = copy.copy(ctx.recurrence)
        for i in reversed(range(len(ctx.blocks))):
            part, inner = ctx.blocks[i]
            count = inner[0][1]
            start = kept[i * ctx.num_states : (i + 1) * ctx.num_states]
            into_rows, into_parameters, into_states = recurrence.backward(
                [x[part] for x in rows],
                parameters,
                start,
                inner,
                d_output[part],
                tuple(d[:count].clone() for d in d_states),
            )
            for total, new in zip(d_rows, into_rows, strict=True):
                total[part] = new
            for total, new in zip(d_parameters, into_parameters, strict=True):
                total += new
            for total, new in zip(d_states, into_states, strict=True):
                total[:count] = new
        return None, None, None, None, None, *d_rows, *d_parameters, *d_states


def _blocks(steps: Steps, size: int) -> list[tuple[slice, list[tuple[int, int]]]]:
    """Return the rows of every ``size`` steps, and the steps counted from their first row."""
    blocks = []
    for i in range(0, len(steps), size):
        inner = steps[i : i + size]
        first, end = inner[0][0], inner[-1][0] + inner[-1][1]
        blocks.append((slice(first, end), [(a - first, n) for a, n in inner]))
    return blocks
