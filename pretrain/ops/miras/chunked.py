"""A memory trained online, chunk after chunk, with all sequences and heads side by side."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.miras.chunk import Tokens, advance
from pretrain.ops.miras.rule import Matrices, MirasRule
from pretrain.ops.shared.chunking import from_chunks, to_chunks


def chunked_miras(
    tokens: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    threshold: Tensor | None,
    starts: Matrices,
    nows: Matrices,
    seen: Tensor | None,
    rule: MirasRule,
    sequences: Sequences,
    chunk_size: int,
) -> tuple[Tensor, Matrices, Matrices]:
    """Train and read a memory chunk after chunk.

    Shapes are those of :func:`pretrain.ops.miras.definition.recurrent_miras`; ``seen`` is None
    where every sequence begins here.
    """
    rows: tuple[Tensor, ...] = tokens if threshold is None else (*tokens, threshold)
    position = None
    if sequences.max_length <= 1:  # a chunk of each token alone
        layout = sequences.chunk_layout(1)
        after = torch.ones_like(layout.order) if seen is None else seen[layout.order] + 1
        ended = after[: len(layout.token_index)] % chunk_size == 0
    else:
        # Each sequence is laid out after as many empty positions as its open chunk has tokens.
        aligned, phase = sequences, None if seen is None else seen % chunk_size
        if phase is not None and bool(phase.any()):
            aligned = Sequences.from_lengths((sequences.sizes + phase).tolist(), sequences.device)
            ids = sequences.ids
            position = aligned.cu_seqlens.long()[ids] + phase[ids] + sequences.positions
            count = aligned.num_tokens
            rows = tuple(x.new_zeros(count, *x.shape[1:]).index_copy(0, position, x) for x in rows)
        layout = aligned.chunk_layout(chunk_size)
        ended = layout.token_index[:, -1] < aligned.num_tokens
    order = layout.order
    output, *ends = _Chunks.apply(
        rule,
        layout.steps,
        len(rows),
        ended,
        *(to_chunks(x, layout, head_axis=2) for x in rows),
        *(a[order] for a in (*starts, *nows)),
    )
    output = from_chunks(output, layout)
    if position is not None:
        output = output.index_select(0, position)
    back = torch.argsort(order)
    ends = [a[back] for a in ends]
    return output, tuple(ends[: len(starts)]), tuple(ends[len(starts) :])


class _Chunks(torch.autograd.Function):
    """All chunks as one differentiable function, which keeps A at the start of each.

    The backward pass goes through the chunks from the last, each computed again. From the second
    chunk on, a sequence's A at the start of the chunk is its A now.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rule: MirasRule,
        steps: list[tuple[int, int]],
        num_rows: int,
        ended: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        rows, states = tensors[:num_rows], tensors[num_rows:]
        number = len(states) // 2
        current = [a.clone() for a in states]
        kept: list[Tensor] = []
        output = torch.empty_like(rows[2])
        for j, (first, count) in enumerate(steps):
            chunk = slice(first, first + count)
            entered = _entered(current, j, count)
            kept.extend(entered if j == 0 else entered[number:])
            part = Tokens(*(x[chunk] for x in rows))
            output[chunk], starts, nows = advance(
                rule, entered[:number], entered[number:], part, ended[chunk]
            )
            for a, new in zip(current, (*starts, *nows), strict=True):
                a[:count] = new
        ctx.rule, ctx.steps, ctx.sizes = rule, steps, (num_rows, number)
        ctx.save_for_backward(ended, *rows, *kept)
        return output, *current

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, *d_ends: Tensor) -> tuple[Tensor | None, ...]:
        num_rows, number = ctx.sizes
        ended, *saved = ctx.saved_tensors
        rows, kept = saved[:num_rows], saved[num_rows:]
        d_rows = [torch.zeros_like(x) for x in rows]
        d_states = [d.clone() for d in d_ends]
        for j in reversed(range(len(ctx.steps))):
            first, count = ctx.steps[j]
            chunk = slice(first, first + count)
            at = (j + 1) * number if j else 0
            entered = [a.detach().requires_grad_() for a in kept[at : at + number * (1 + (j == 0))]]
            part = [x[chunk].detach().requires_grad_() for x in rows]
            with torch.enable_grad():
                y, starts, nows = advance(
                    ctx.rule,
                    tuple(entered[:number]),
                    tuple(entered[-number:]),
                    Tokens(*part),
                    ended[chunk],
                )
                found = torch.autograd.grad(
                    (y, *starts, *nows),
                    [*part, *entered],
                    (d_output[chunk], *(d[:count] for d in d_states)),
                    allow_unused=True,
                    materialize_grads=True,
                )
            for total, new in zip(d_rows, found[:num_rows], strict=True):
                total[chunk] = new
            if j:
                for d in d_states[:number]:
                    d[:count] = 0
            for d, new in zip(d_states[-len(entered) :], found[num_rows:], strict=True):
                d[:count] = new
        return None, None, None, None, *d_rows, *d_states


def _entered(current: list[Tensor], step: int, count: int) -> Matrices:
    """Return starts and nows of the sequences that still run."""
    number = len(current) // 2
    nows = tuple(a[:count].clone() for a in current[number:])
    return (*(a[:count].clone() for a in current[:number]), *nows) if step == 0 else nows * 2
