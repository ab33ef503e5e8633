"""Exchange what crosses borders where a row is divided over ranks, segment by segment.

An op whose sequences are a segment of a row (:class:`pretrain.data.sequences.Segment`) computes on
its tokens what it would on the whole row. Every function here is entered by all ranks of the
segment's group alike, and its backward pass too: each is one autograd function, which has a node on
every rank whatever that rank has to send. Where no sequence crosses a border nothing is sent.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.chain import receive, send


def crossing(sequences: Sequences) -> Segment | None:
    """Return the segment, of a row some of whose sequences lie on several ranks, or None.

    All ranks are told the same.
    """
    segment = sequences.segment
    if segment is None or segment.group is None or not any(segment.continues):
        return None
    return segment


def scan(segment: Segment, transition: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return the state that enters this segment, and transitions for :func:`scan_back`.

    The transitions are those of all ranks, in a ring this rank's alone. Neither has a gradient.

    ``end`` ``[H, K, V]`` is the state after the last piece where it starts from zeros,
    ``transition`` ``[H, K, K]`` what multiplies a state that goes through the segment, or of decays
    alone ``[H, K or 1, 1]``. The state is zeros where no sequence enters.
    """
    transition, end = transition.detach(), end.detach()
    if segment.ring:
        state = pass_on(segment, +1, end, transition)
        return (torch.zeros_like(end) if state is None else state), transition[None]
    transitions, ends = gather(segment, transition, end)
    state = torch.zeros_like(end)
    for rank in range(segment.rank):
        state = ends[rank] + (multiply(transitions[rank], state) if segment.through[rank] else 0)
    return (state if segment.continues[segment.rank] else torch.zeros_like(end)), transitions


def pass_on(segment: Segment, by: int, end: Tensor, transition: Tensor) -> Tensor | None:
    """Return what the neighbour on one side has sent, and send on what this segment makes of it.

    That is ``end``, and ``transition`` times what has come where it goes through the whole segment.
    ``by``: +1 for states, -1 for gradients, which go back. None where nothing comes.
    """
    through = segment.through[segment.rank]
    if not through:  # nobody has to wait for what comes
        to_neighbour(segment, by, end)
    found = from_neighbour(segment, by, end)
    if through:
        to_neighbour(segment, by, end if found is None else end + multiply(transition, found))
    return found


def from_neighbour(segment: Segment, by: int, like: Tensor) -> Tensor | None:
    """Return what the rank ``by`` before this one has sent, None where no sequence crosses."""
    if not segment.crosses(-by):
        return None
    return receive(segment, -by, [(like.shape, like.dtype)], like.device)[0]


def to_neighbour(segment: Segment, by: int, x: Tensor) -> None:
    """Send a tensor to the rank ``by`` further, where a sequence crosses the border between."""
    if segment.crosses(by):
        send(segment, by, [x])


def multiply(transition: Tensor, state: Tensor) -> Tensor:
    """Multiply a state by a transition, which is a matrix or a column of decays."""
    return transition * state if transition.shape[-1] == 1 else transition @ state


def carry(
    segment: Segment,
    output: Tensor,
    states: Tensor,
    reads: Tensor,
    transitions: Tensor,
    first: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return output ``[1, L, H, V]`` and states ``[N, H, K, V]``, of an op from what entered.

    The backward pass adds what later segments pass back to the gradient of the last state.
    ``reads`` ``[L_0, H, K]`` is by what each token of the first piece multiplies the state that
    entered, ``first`` the transition over that piece, ``transitions`` what :func:`scan` returned.
    """
    result: tuple[Tensor, Tensor] = _Carry.apply(output, states, segment, reads, transitions, first)
    return result


class _Carry(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        output: Tensor,
        states: Tensor,
        segment: Segment,
        reads: Tensor,
        transitions: Tensor,
        first: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.segment = segment
        ctx.save_for_backward(reads, transitions, first)
        return output.view_as(output), states.view_as(states)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_output: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
        segment: Segment = ctx.segment
        reads, transitions, first = ctx.saved_tensors
        entered = torch.zeros_like(d_states[0])
        if segment.continues[segment.rank]:
            wide, read = d_states.dtype, d_output[0, : len(reads)]
            entered = torch.einsum("thk,thv->hkv", reads.to(wide), read.to(wide))
            entered += multiply(first.mT if first.shape[-1] > 1 else first, d_states[0])
        left = scan_back(segment, entered, transitions)
        if left is not None:
            d_states = d_states.clone()
            d_states[-1] += left
        return d_output, d_states, None, None, None, None


def scan_back(segment: Segment, entered: Tensor, transitions: Tensor) -> Tensor | None:
    """Return the gradient of what left this segment, None where nothing did.

    ``entered`` is that of what entered it, seen from this segment alone, ``transitions`` what
    :func:`scan` has returned.
    """
    if segment.ring:
        (transition,) = transitions
        return pass_on(
            segment, -1, entered, transition.mT if transition.shape[-1] > 1 else transition
        )
    (all_entered,) = gather(segment, entered)
    return left_gradient(segment, all_entered, transitions)


def left_gradient(segment: Segment, entered: Tensor, transitions: Tensor) -> Tensor | None:
    """Return the gradient of what left this segment, None where nothing did.

    ``entered`` are those, by rank, of what entered each segment, seen from that segment alone.
    """
    gradient: Tensor | None = None
    for rank in range(segment.size - 1, segment.rank, -1):
        if not segment.continues[rank]:
            gradient = None
        elif gradient is None or not segment.through[rank]:
            gradient = entered[rank]
        else:
            step = transitions[rank]
            gradient = entered[rank] + multiply(step.mT if step.shape[-1] > 1 else step, gradient)
    return gradient


def gather(segment: Segment, *tensors: Tensor) -> list[Tensor]:
    """Return each tensor from all ranks ``[size, ...]``, in one message and without a gradient."""
    message = torch.cat([x.reshape(-1) for x in tensors])
    found = message.new_empty(segment.size, len(message))
    dist.all_gather(list(found.unbind(0)), message, group=segment.group)
    parts = found.split([x.numel() for x in tensors], 1)
    return [part.reshape(segment.size, *x.shape) for part, x in zip(parts, tensors, strict=True)]


def halo(
    sequences: Sequences, rows: Tensor, count: int, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the rows before this segment that belong to the first piece's sequence, and ``rows``.

    There are ``count`` of them, or as many as the sequence has. ``rows`` ``[L, ...]`` are this
    rank's, one for each token; those returned are to be used from then on, so that the exchange is
    in the graph of every rank. ``start``: rows that stand before the first token of the last piece
    where it begins here, equally many on all ranks.
    """
    segment = sequences.segment
    assert segment is not None
    more = 0 if start is None else len(start)
    sizes = [len(rows) + (0 if through else more) for through in segment.through]
    reaches = [min(seen + more, count) for seen in sequences.derive(_seen)]
    taken = [  # by each rank of each owner's last rows
        [
            min(max(reach - sum(sizes[owner + 1 : rank]), 0), sizes[owner]) if owner < rank else 0
            for owner in range(segment.size)
        ]
        for rank, reach in enumerate(reaches)
    ]
    tail = rows[-count:]
    if start is not None and not segment.through[segment.rank]:
        tail = torch.cat([start, rows[-sequences.lengths[-1] :]])[-count:]
    result: tuple[Tensor, Tensor] = _Halo.apply(rows, tail, segment, taken)
    return result


def _seen(sequences: Sequences) -> list[int]:
    """Return for each segment the tokens of its first sequence that lie before it."""
    segment = sequences.segment
    assert segment is not None
    starts = [0, *itertools.accumulate(segment.row.lengths)]
    borders = [rank * sequences.num_tokens for rank in range(segment.size)]
    return [border - max(start for start in starts if start <= border) for border in borders]


class _Halo(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any, rows: Tensor, tail: Tensor, segment: Segment, taken: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        ctx.segment, ctx.taken, ctx.length = segment, taken, len(tail)
        sent = [[tail[len(tail) - row[segment.rank] :]] for row in taken]
        found = swap(segment, sent, [[(n, *tail.shape[1:])] for n in taken[segment.rank]])
        return torch.cat([part for (part,) in found]), rows.view_as(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_before: Tensor, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        segment, taken, shape = ctx.segment, ctx.taken, d_before.shape[1:]
        counts = [row[segment.rank] for row in taken]
        sent = [[part] for part in d_before.split(taken[segment.rank])]
        found = swap(segment, sent, [[(n, *shape)] for n in counts])
        d_tail = d_before.new_zeros(ctx.length, *shape)
        for n, (part,) in zip(counts, found, strict=True):
            d_tail[len(d_tail) - n :] += part
        return d_rows, d_tail, None, None


def swap(
    segment: Segment, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
) -> list[list[Tensor]]:
    """Send tensors to every rank of a segment's group; see :func:`swap_in`."""
    return swap_in(segment.group, sent, shapes)


def swap_in(
    group: Any, sent: Sequence[Sequence[Tensor]], shapes: Sequence[Sequence[Sequence[int]]]
) -> list[list[Tensor]]:
    """Send tensors to every rank of a group, and return what each has sent here.

    ``sent[j]`` goes to rank j; ``shapes[j]`` are those of what comes from it, in the same dtypes.
    All goes in one message of bytes, so that they may differ.
    """
    dtypes = [x.dtype for x in sent[0]]
    messages = [
        torch.cat([x.reshape(-1).contiguous().view(torch.uint8) for x in row]) for row in sent
    ]
    sizes = [
        [
            torch.Size(shape).numel() * dtype.itemsize
            for shape, dtype in zip(row, dtypes, strict=True)
        ]
        for row in shapes
    ]
    found = messages[0].new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(
        found,
        torch.cat(messages),
        [sum(row) for row in sizes],
        [len(x) for x in messages],
        group=group,
    )
    parts = iter(found.split(list(itertools.chain.from_iterable(sizes))))
    return [
        [
            _from_bytes(next(parts), dtype).view(*shape)
            for shape, dtype in zip(row, dtypes, strict=True)
        ]
        for row in shapes
    ]


def _from_bytes(x: Tensor, dtype: torch.dtype) -> Tensor:
    aligned = x.storage_offset() % dtype.itemsize == 0
    return (x if aligned else x.clone()).view(dtype)
