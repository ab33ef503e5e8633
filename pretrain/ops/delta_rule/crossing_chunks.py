"""The chunked delta rule over a row that is divided over ranks, its UT transform used twice.

What a segment makes of the state that enters it is ``S -> E + M S``. M is 0 where a sequence begins
in the segment: what it hands on is then what the loop over chunk-start states finds, which for the
piece that enters runs after the exchange, and in the backward pass for the one that is handed on.
Where one sequence goes through the whole segment, E and M follow chunk by chunk from the W and U of
the chunked form (chunked.py), which do not depend on any state, so that only that loop runs twice,
as does the one over gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.across import crossing, from_neighbour, scan, scan_back, to_neighbour
from pretrain.ops.shared.chunk_decay import ScalarDecay, VectorDecay

Loop = list[tuple[slice, slice]]  # in the order of time, chunks and the rows of their states


@dataclass
class CrossingChunks:
    """Where the pieces at a segment's borders lie among its chunks.

    Attributes:
        segment: The segment.
        first: Indices of the first piece's chunks, in the order of time.
        last: Those of the last piece's.
        steps: Where the chunks of each step of time begin, and how many there are.
        first_row: Index of the first piece's state, in the layout's order.
        last_row: That of the last piece's.
    """

    segment: Segment
    first: list[int]
    last: list[int]
    steps: list[tuple[int, int]]
    first_row: int
    last_row: int

    @property
    def enters(self) -> bool:
        """Whether the first piece goes on from the segment before."""
        return self.segment.crosses(-1)

    @property
    def goes_through(self) -> bool:
        """Say whether what is handed on depends on what enters: one sequence has all the tokens."""
        return self.segment.through[self.segment.rank] and self.segment.crosses(+1)

    @property
    def before_entering(self) -> Loop:
        """Return the loop that does not depend on what enters, of all pieces but one."""
        return self._without(self.first_row) if self.enters else at_once(self.steps)

    @property
    def from_what_entered(self) -> Loop:
        """Return the loop of the piece that enters, if one does."""
        return _of_piece(self.first, self.first_row) if self.enters else []

    @property
    def not_handed_on(self) -> Loop:
        """Return the loop whose gradients later segments add nothing to, of all pieces but one."""
        return self._without(self.last_row) if self.segment.crosses(+1) else at_once(self.steps)

    @property
    def handed_on(self) -> Loop:
        """Return the loop of the piece that goes on in the next segment, if one does."""
        return _of_piece(self.last, self.last_row) if self.segment.crosses(+1) else []

    def _without(self, row: int) -> Loop:
        found = []
        for start, count in self.steps:
            found += [(0, start, min(row, count)), (row + 1, start, count)]
        return [(slice(at + a, at + b), slice(a, b)) for a, at, b in found if a < b]

    @property
    def hands_on(self) -> bool:
        """Tell whether the state is received before the loop over chunks and sent on after it.

        In a ring it is where one sequence goes through the whole segment, whose map then need
        not be known.
        """
        return self.segment.ring and self.segment.through[self.segment.rank]

    def enter(
        self,
        decay: ScalarDecay | VectorDecay,
        w: Tensor,
        values: Tensor,
        k_end: Tensor,
        state: Tensor,
    ) -> Tensor:
        """Put the state that enters into ``state`` ``[N, H, K, V]``, of the layout's pieces.

        Those that do not depend on it have their final states there.
        ``w`` ``[n, H, C, K]``, ``values`` (U) and ``k_end`` are those of the n chunks. Returns
        ``transitions`` for :meth:`leave`.
        """
        if self.hands_on:
            received = from_neighbour(self.segment, +1, state[self.first_row])
            assert received is not None
            state[self.first_row] = received
            return state.new_empty(0)
        key_dim = state.shape[-2]
        end = torch.zeros_like(state[0])
        transition = end.new_zeros(len(end), key_dim, key_dim)
        if self.goes_through:
            # From the end: a chunk's part of E is a product with what it writes, not a loop.
            transition = transition + torch.eye(key_dim, dtype=end.dtype, device=end.device)
            for chunk in reversed(self.last):
                write = transition @ k_end[chunk].mT
                end += write @ values[chunk]
                transition = decay.over_chunk[chunk].mT * transition - write @ w[chunk]
        elif self.segment.crosses(+1):
            end = state[self.last_row]
        entering, transitions = scan(self.segment, transition, end)
        if self.enters:
            state[self.first_row] = entering
        return transitions

    def entered(self, state: Tensor) -> None:
        """Send the final state on, where :meth:`enter` has not sent a map's."""
        if self.hands_on:
            to_neighbour(self.segment, +1, state[self.last_row])

    def leave(
        self,
        decay: ScalarDecay | VectorDecay,
        w: Tensor,
        k_end: Tensor,
        d_read: Tensor,
        d_written: Tensor,
        d_state: Tensor,
        transitions: Tensor,
    ) -> None:
        """Add to the gradient of the final states ``d_state`` what later segments pass back.

        That of pieces that are not handed on is of their initial states by now.
        ``d_read`` ``[n, H, K, V]`` and ``d_written`` ``[n, H, C, V]`` are what outputs pass to
        their chunk's start and to what is written in it.
        """
        if self.hands_on:
            left = from_neighbour(self.segment, -1, d_state[self.last_row])
            if left is not None:
                d_state[self.last_row] += left
            return
        entered = torch.zeros_like(d_state[0])
        if self.enters:
            entered = d_state[self.first_row]
        if self.goes_through:
            for chunk in reversed(self.first):
                d_new = d_written[chunk] + k_end[chunk] @ entered
                entered = decay.over_chunk[chunk] * entered + d_read[chunk]
                entered -= w[chunk].mT @ d_new
        left = scan_back(self.segment, entered, transitions)
        if left is not None:
            d_state[self.last_row] += left

    def left(self, d_state: Tensor) -> None:
        """Send the gradient of the state that entered back, and set it to 0: the op has none."""
        if self.hands_on:
            to_neighbour(self.segment, -1, d_state[self.first_row])
        if self.enters:
            d_state[self.first_row] = 0


def crossing_chunks(sequences: Sequences, chunk_size: int) -> CrossingChunks | None:
    """Return where a segment's outer pieces lie among its chunks, None where no sequence crosses.

    ``sequences.derive`` is to call it, with the size that the chunks' layout is made for.
    """
    segment = crossing(sequences)
    if segment is None:
        return None
    layout = sequences.chunk_layout(chunk_size)
    order = layout.order.tolist()
    rows = order.index(0), order.index(len(order) - 1)
    first, last = ([start + row for start, count in layout.steps if row < count] for row in rows)
    return CrossingChunks(segment, first, last, layout.steps, *rows)


def at_once(steps: list[tuple[int, int]]) -> Loop:
    """Return the loop over the chunks of all pieces side by side."""
    return [(slice(start, start + count), slice(count)) for start, count in steps]


def _of_piece(chunks: list[int], row: int) -> Loop:
    return [(slice(chunk, chunk + 1), slice(row, row + 1)) for chunk in chunks]
