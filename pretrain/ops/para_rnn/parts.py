"""Rows of packed tokens cut into parts, which the shooting kernels work off side by side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, without_waiting

FEW = 512  # tokens that a part may have whatever the sequences' lengths
MOST = 256  # parts that hold an equal share of the tokens, of which gradients are left


@dataclass(frozen=True)
class Parts:
    """Whole sequences in a row, so that each part starts from a state that is given.

    Attributes:
        starts: ``[P + 1]`` int64, where each part begins and the last one ends.
        count: P.
        longest: tokens of the longest part.
        borders: ``[T]`` int32, 0 but at a sequence's first and last token: 4 times its number, and
            1 at the first, 2 at the last, 3 where these are one.
    """

    starts: Tensor
    count: int
    longest: int
    borders: Tensor


def parts_of(sequences: Sequences) -> Parts:
    """Return the parts of ``sequences``, computed once per batch.

    A part has as many sequences as fit into the length of the longest of all: the longest has to be
    walked through anyway, and others beside it cost no time until then.
    """
    return sequences.derive(_parts_of)


def _parts_of(sequences: Sequences) -> Parts:
    limit = max(sequences.max_length, FEW, -(-sequences.num_tokens // MOST))
    starts, end = [0], 0
    for length in sequences.lengths:
        if end + length - starts[-1] > limit:
            starts.append(end)
        end += length
    if end > starts[-1]:
        starts.append(end)
    longest = max((b - a for a, b in itertools.pairwise(starts)), default=0)
    ids, positions = sequences.ids, sequences.positions
    first, last = positions == 0, positions == sequences.sizes[ids] - 1
    borders = torch.where(first | last, 4 * ids + first.long() + 2 * last.long(), 0)
    return Parts(
        without_waiting(torch.tensor(starts), sequences.device),
        len(starts) - 1,
        longest,
        borders.int(),
    )
