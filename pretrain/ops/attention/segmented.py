"""Attention over a row that is divided over ranks: by a halo, over heads, or keys gathered."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Segment, Sequences, pieces_alone
from pretrain.ops.across import gather, halo, swap
from pretrain.ops.over_heads import Ends, over_heads

Run = Callable[[Tensor, Tensor, Tensor, Sequences, Sequences], Tensor]


def segmented_attention(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    sequences: Sequences,
    segment: Segment,
) -> Tensor:
    """Attend on a segment; ``run(q, k, v, sequences, sequences_k)`` is the op.

    With a window the keys before the segment are fetched. Otherwise every rank attends in the whole
    row with some of the heads, which is the same work whatever the sequences are. Where there are
    more ranks than heads, keys are gathered.
    """
    if window is not None:
        before, rows = halo(sequences, torch.cat([k, v], 2)[0], window - 1)
        keys = pieces = pieces_alone(sequences)
        if segment.continues[segment.rank]:
            rows = torch.cat([before, rows])
            keys = sequences.derive(_after, len(before))
        k, v = rows[None].chunk(2, 2)
        return run(q, k, v, pieces, keys)
    if segment.size > q.shape[2]:
        return _with_all_keys(run, q, k, v, sequences, segment)

    def attend(tensors: Any, states: Any, whole: Sequences, heads: slice) -> tuple[Tensor, Ends]:
        q, k, v = tensors
        return run(q, k, v, whole, whole), ()

    return over_heads(sequences, attend, (q, k, v), q.shape[2])[0]


def _after(sequences: Sequences, count: int) -> Sequences:
    """Return the pieces with ``count`` tokens before the first."""
    first, *others = sequences.lengths
    return Sequences.from_lengths([first + count, *others], sequences.device)


def _with_all_keys(
    run: Run, q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, segment: Segment
) -> Tensor:
    """Attend to the keys of the row, with queries of its front and of its back.

    Rank r of n has parts r and 2n - 1 - r of 2n, so that all have the same work where one sequence
    fills the row.
    """
    keys: Tensor = _Gathered.apply(torch.cat([k, v], 2)[0], segment)
    mirrored: Tensor = _Mirrored.apply(q[0], segment, True)
    parts = sequences.derive(_mirrored_parts)
    outputs = []
    for x, (start, stop, queries, seen) in zip(
        mirrored.split([queries.num_tokens for _, _, queries, _ in parts]), parts, strict=True
    ):
        if len(x):
            k, v = keys[start:stop][None].chunk(2, 2)
            x = run(x[None], k, v, queries, seen)[0]
        outputs.append(x)
    result: Tensor = _Mirrored.apply(torch.cat(outputs), segment, False)
    return result[None]


def _halves(segment: Segment, rank: int, mirrored: bool) -> tuple[int, int]:
    """Return the numbers of the two of 2n parts that a rank has."""
    return (rank, 2 * segment.size - 1 - rank) if mirrored else (2 * rank, 2 * rank + 1)


def _bounds(segment: Segment, length: int, part: int) -> tuple[int, int]:
    """Return where one of the 2n parts begins and ends; a rank's first may be a token shorter."""
    middle = part // 2 * length + length // 2
    return (middle, (part // 2 + 1) * length) if part % 2 else (part // 2 * length, middle)


def _mirrored_parts(sequences: Sequences) -> list[tuple[int, int, Sequences, Sequences]]:
    """Return for both parts of this rank which keys of the row they see, and the sequences."""
    segment, length = sequences.segment, sequences.num_tokens
    assert segment is not None
    ends = list(itertools.accumulate(segment.row.lengths))
    starts = sorted({0, *ends} - {ends[-1]})
    found = []
    for part in _halves(segment, segment.rank, True):
        first, last = _bounds(segment, length, part)
        begun = max(start for start in starts if start <= first)
        cuts = [first, *(start for start in starts if first < start < last), last]
        lengths = [b - a for a, b in itertools.pairwise(cuts)]
        queries = Sequences.from_lengths(lengths, sequences.device)
        lengths[0] += first - begun
        found.append((begun, last, queries, Sequences.from_lengths(lengths, sequences.device)))
    return found


class _Gathered(torch.autograd.Function):
    """Rows ``[L, ...]`` of all ranks; gradients are summed in float32 or wider."""

    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, segment: Segment) -> Tensor:
        ctx.segment = segment
        (found,) = gather(segment, rows)
        return found.flatten(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        segment = ctx.segment
        parts = gradient.chunk(segment.size)
        found = swap(segment, [[x] for x in parts], [[x.shape] for x in parts])
        wide = torch.promote_types(gradient.dtype, torch.float32)
        total = torch.stack([x for (x,) in found]).sum(0, dtype=wide)
        return total.to(gradient.dtype), None


class _Mirrored(torch.autograd.Function):
    """Rows of a segment's two halves to those of parts r and 2n - 1 - r of the row, or back."""

    @staticmethod
    @override
    def forward(ctx: Any, rows: Tensor, segment: Segment, there: bool) -> Tensor:
        ctx.given = segment, there
        return _mirror(rows, segment, there)

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        segment, there = ctx.given
        return _mirror(gradient, segment, not there), None, None


def _mirror(rows: Tensor, segment: Segment, there: bool) -> Tensor:
    own, ranks = segment.rank, range(segment.size)
    # Both halves together are one segment long, either way: part 2n-1-r mirrors part r.
    length = len(rows)

    def size(part: int) -> int:
        first, last = _bounds(segment, length, part)
        return last - first

    have, want = ([_halves(segment, rank, x) for rank in ranks] for x in (not there, there))
    halves = dict(zip(have[own], rows.split([size(part) for part in have[own]]), strict=True))
    sent = [[part for part in have[own] if part in want[rank]] for rank in ranks]
    coming = [[part for part in have[rank] if part in want[own]] for rank in ranks]
    messages = [[torch.cat([rows[:0], *(halves[part] for part in parts)])] for parts in sent]
    counts = [sum(map(size, parts)) for parts in coming]
    found = swap(segment, messages, [[(n, *rows.shape[1:])] for n in counts])
    got: dict[int, Tensor] = {}
    for parts, (x,) in zip(coming, found, strict=True):
        got |= dict(zip(parts, x.split([size(part) for part in parts]), strict=True))
    return torch.cat([got[part] for part in want[own]])
