"""Ops over whole sequences where a row is divided over ranks: time is exchanged for heads."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Segment, Sequences, without_waiting
from pretrain.ops.across import swap

# What of an op's states comes back: rows [R, h, ...], and how many each sequence of the row has.
Ends = Sequence[tuple[Tensor, Sequence[int]]]
OverHeads = Callable[[Sequence[Tensor], Sequence[Tensor], Sequences, slice], tuple[Tensor, Ends]]


def over_heads(
    sequences: Sequences,
    function: OverHeads,
    tensors: Sequence[Tensor],
    num_heads: int,
    states: Sequence[Tensor] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Compute a function of whole sequences with each rank's share of the heads.

    ``tensors`` ``[1, L, H_i, ...]`` are of this segment; H_i divides ``num_heads`` H, and each of
    the H_i serves consecutive ones of H. ``states`` ``[N, H, ...]`` are what the pieces that begin
    here start from. ``function(tensors, states, sequences, heads)`` is given ``[1, T, h, ...]`` of
    the whole row, the states of all its sequences, these, and which of the H heads are here. It
    returns the output ``[1, T, h, ...]`` and the states after each sequence.

    Returns the output ``[1, L, H, ...]`` of this segment, and of each state the rows of the
    sequences that have a piece here: what they have after their last token, wherever it is.
    """
    segment = sequences.segment
    assert segment is not None
    row = sequences.derive(_whole_row)
    own, size, length = segment.rank, segment.size, sequences.num_tokens
    cuts = [rank * num_heads // size for rank in range(size + 1)]
    heads = [range(a, b) for a, b in itertools.pairwise(cuts)]
    here = heads[own]
    sent, shares = [], []
    for x in tensors:
        group = num_heads // x.shape[2]
        wanted = [range(h.start // group, (h.stop - 1) // group + 1) if h else h for h in heads]
        sent.append(_select(x[0], 1, wanted))
        shares.append([len(w) for w in wanted])
    for x in states:
        sent.append(x[int(segment.continues[own]) :])
        shares.append([len(h) for h in heads])
    tokens, starting = [length] * size, [len(begins) for begins in row.begins]
    joins = [tokens] * len(tensors) + [starting] * len(states)
    found: tuple[Tensor, ...] = _Redivide.apply(segment, 1, shares, joins, *sent)
    inner = [
        _as_groups(x, num_heads // whole.shape[2], here)[None]
        for x, whole in zip(found, tensors, strict=False)
    ]
    begun, share = list(found[len(tensors) :]), slice(here.start, here.stop)
    if not here:
        # One of zeros stands in, of which nothing is sent: parameters then have a gradient here.
        inner = [x.new_zeros(1, x.shape[1], 1, *x.shape[3:]) for x in inner]
        begun = [x.new_zeros(len(x), 1, *x.shape[2:]) for x in begun]
        share = slice(0, 1)
    output, ends = function(inner, begun, row.sequences, share)
    if not here:
        output = output[:, :, :0] + sum(x.sum() for x in found)
        ends = [(x[:, :0], counts) for x, counts in ends]
    back, shares = [output[0]], [tokens]
    for x, counts in ends:
        first = [0, *itertools.accumulate(counts)]
        held = [range(first[h.start], first[h.stop]) for h in row.holds]
        back.append(_select(x, 0, held))
        shares.append([len(h) for h in held])
    result, *finals = _Redivide.apply(
        segment, 0, shares, [[len(h) for h in heads]] * len(back), *back
    )
    return result[None], list(finals)


def has_heads(sequences: Sequences, num_heads: int) -> bool:
    """Return whether this rank has any of the heads, or one of zeros that stands in."""
    segment = sequences.segment
    assert segment is not None
    rank, size = segment.rank, segment.size
    return rank * num_heads // size < (rank + 1) * num_heads // size


def held_sequences(sequences: Sequences) -> slice:
    """Return which of the row's sequences that have tokens have a piece in this segment."""
    segment = sequences.segment
    assert segment is not None
    held = sequences.derive(_whole_row).holds[segment.rank]
    return slice(held.start, held.stop)


@dataclass(frozen=True)
class _WholeRow:
    """The row of a segment.

    Attributes:
        sequences: Those of the row that have tokens, on the device.
        begins: For each rank, which of them begin in its segment.
        holds: For each rank, which of them have tokens there.
    """

    sequences: Sequences
    begins: list[range]
    holds: list[range]


def _whole_row(sequences: Sequences) -> _WholeRow:
    segment, length = sequences.segment, sequences.num_tokens
    assert segment is not None
    lengths = [n for n in segment.row.lengths if n]
    starts = [0, *itertools.accumulate(lengths)][:-1]
    borders = [rank * length for rank in range(segment.size + 1)]
    cuts = [bisect.bisect_left(starts, border) for border in borders]
    begins = [range(a, b) for a, b in itertools.pairwise(cuts)]
    holds = [
        range(b.start - int(continues), b.stop)
        for b, continues in zip(begins, segment.continues, strict=True)
    ]
    return _WholeRow(Sequences.from_lengths(lengths, sequences.device), begins, holds)


def _select(x: Tensor, axis: int, parts: Sequence[range]) -> Tensor:
    """Return the indices of all ranks' parts along an axis, which may overlap."""
    index = list(itertools.chain.from_iterable(parts))
    if index == list(range(x.shape[axis])):
        return x
    return x.index_select(axis, _indices(index, x.device))


def _as_groups(x: Tensor, group: int, heads: range) -> Tensor:
    """Return x ``[T, s, ...]`` such that each of its heads serves equally many of ``heads``."""
    served = [head // group - heads.start // group for head in heads]
    count = x.shape[1]
    evenly = [i * count // len(heads) for i in range(len(heads))]
    if not heads or (len(heads) % count == 0 and served == evenly):
        return x
    return x.index_select(1, _indices(served, x.device))


def _indices(numbers: list[int], device: torch.device) -> Tensor:
    return without_waiting(torch.tensor(numbers, dtype=torch.int64, device="cpu"), device)


class _Redivide(torch.autograd.Function):
    """Divide tensors among ranks along one of the first two axes, and join along the other.

    ``splits[i][j]`` is rank j's size of tensor i along ``axis``, ``joins[i][j]`` what it has of the
    other axis.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        segment: Segment,
        axis: int,
        splits: list[list[int]],
        joins: list[list[int]],
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.given = segment, axis, splits, joins
        return _redivide(segment, axis, splits, joins, tensors)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        segment, axis, splits, joins = ctx.given
        return None, None, None, None, *_redivide(segment, 1 - axis, joins, splits, gradients)


def _redivide(
    segment: Segment,
    axis: int,
    splits: list[list[int]],
    joins: list[list[int]],
    tensors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    parts = [x.split(sizes, axis) for x, sizes in zip(tensors, splits, strict=True)]
    shapes: list[list[list[int]]] = [[] for _ in range(segment.size)]
    for x, sizes, counts in zip(tensors, splits, joins, strict=True):
        for rank, count in enumerate(counts):
            shape = list(x.shape)
            shape[axis], shape[1 - axis] = sizes[segment.rank], count
            shapes[rank].append(shape)
    found = swap(segment, list(zip(*parts, strict=True)), shapes)
    return tuple(torch.cat(pieces, 1 - axis) for pieces in zip(*found, strict=True))
