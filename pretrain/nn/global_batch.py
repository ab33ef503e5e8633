"""The places of a micro-batch's tokens in the global batch, which random numbers are drawn by.

What is drawn for a sequence is then the same under every layout and size of micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from pretrain.parallel.context import ParallelContext


class Piece(NamedTuple):
    """A sequence, as far as a row of a micro-batch has it.

    Attributes:
        number: Of the sequence in the global batch.
        length: Tokens of the sequence.
        tokens: Those of the sequence that are in the row.
        row: The row.
        places: Where in the row they are.
    """

    number: int
    length: int
    tokens: slice
    row: int
    places: slice


def sequences_of(
    x: Tensor,
    micro_batch: int,
    seq_len: int | None,
    context: ParallelContext,
    place: tuple[int, int] | None = None,
) -> Iterator[Piece]:
    """Yield the pieces of sequences that x ``[T, B, d]`` has, which are this process's tokens.

    ``micro_batch`` is x's number in the global batch, ``seq_len`` the tokens of a sequence; None: a
    row is one. ``place``: x's first token and the number of all tokens in its row, of which the
    micro-batch has one; None: x has full rows.
    """
    tokens, rows, _ = x.shape
    parts, part = context.context_size, context.context_rank
    if context.sequence_parallel:  # which shards each segment
        parts, part = parts * context.tensor_size, part * context.tensor_size + context.tensor_rank
    first, full = place or (0, tokens * parts)
    length = seq_len or full
    for row in range(rows):
        start = (micro_batch * rows + row) * full + first + tokens * part
        stop = start + tokens
        for number in range(start // length, -(-stop // length)):
            begins = number * length
            low, high = max(begins, start), min(begins + length, stop)
            here, there = slice(low - start, high - start), slice(low - begins, high - begins)
            yield Piece(number, length, there, row, here)
