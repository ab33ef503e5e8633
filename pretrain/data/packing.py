"""How documents fill the sequences of a batch: one after another, or each where it fits best."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from pretrain.data.order import Mix
from pretrain.data.sequences import Sequences
from pretrain.data.shards import TokenStream

# Documents that are packed together: enough to fill sequences to some 99.9 % (see docs/phases.md).
_TOGETHER = 4096


class Row(NamedTuple):
    """One sequence of a batch: the tokens, the one after each, and the pieces that it is made of.

    Attributes:
        inputs: ``[T]`` int64.
        targets: ``[T]`` int64.
        lengths: Tokens of each piece; the last one is the empty end where ``counted`` < T.
        counted: Tokens before the empty end.
    """

    inputs: np.ndarray
    targets: np.ndarray
    lengths: list[int]
    counted: int


class PackedRows:
    """The documents of a stream, packed into rows of ``seq_len`` tokens by best fit decreasing.

    Documents longer than a row are cut into rows and a rest; then, of some thousands at once, the
    longest piece comes first, into the fullest row that has room for it (arXiv 2404.10830).

    ``left``: first tokens and lengths of what to pack of the documents; None: all of them.
    """

    def __init__(
        self,
        stream: TokenStream,
        seq_len: int,
        eod_id: int,
        left: tuple[np.ndarray, np.ndarray] | None = None,
    ):
        self.stream, self.seq_len, self.eod_id = stream, seq_len, eod_id
        if left is None:
            lengths = stream.document_lengths()
            left = np.cumsum(lengths) - lengths, lengths
        self.documents, self.cut = len(left[1]), int((left[1] > seq_len).sum())
        starts, sizes, rows, owners = _pieces(*left, seq_len)
        order = np.argsort(rows, kind="stable")
        self._starts, self._sizes, self._owners = starts[order], sizes[order], owners[order]
        self._first = np.searchsorted(rows[order], np.arange(int(rows.max(initial=-1)) + 2))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._first) - 1

    def without(self, read: np.ndarray, seq_len: int) -> PackedRows:
        """Return other rows, of ``seq_len`` tokens, of what the rows of the mask ``read`` lack.

        Neighbouring pieces of one document are one again.
        """
        kept = np.flatnonzero(~np.repeat(read, np.diff(self._first)))
        kept = kept[np.argsort(self._starts[kept])]
        starts, sizes, owners = self._starts[kept], self._sizes[kept], self._owners[kept]
        goes_on = (starts[1:] == starts[:-1] + sizes[:-1]) & (owners[1:] == owners[:-1])
        begins = np.flatnonzero(np.append(True, ~goes_on)[: len(kept)])
        ends = np.append(0, np.cumsum(sizes))
        lengths = np.diff(np.append(ends[begins], ends[-1]))
        return PackedRows(self.stream, seq_len, self.eod_id, (starts[begins], lengths))

    def read(self, number: int) -> Row:
        """Return a row."""
        inputs = np.full(self.seq_len, self.eod_id)
        targets, lengths, at = inputs.copy(), [], 0
        for piece in range(self._first[number], self._first[number + 1]):
            start, size = int(self._starts[piece]), int(self._sizes[piece])
            # Before the first token of a document is the one that ends the document before.
            before = 1 if start else 0
            found = self.stream.read(start - before, size + before)
            inputs[at + 1 - before : at + size] = found[:-1]
            targets[at : at + size] = found[before:]
            lengths.append(size)
            at += size
        rest = self.seq_len - at
        return Row(inputs, targets, [*lengths, rest] if rest else lengths, at)


def _pieces(
    starts: np.ndarray, lengths: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return first token, size, row and document of every piece of documents, or parts of them."""
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = starts[document] + within * seq_len
    sizes = np.minimum(lengths[document] - within * seq_len, seq_len)
    rows, done = np.empty(len(sizes), np.int64), 0
    for start in range(0, len(sizes), _TOGETHER):
        found, count = best_fit(sizes[start : start + _TOGETHER].tolist(), seq_len)
        rows[start : start + _TOGETHER] = done + np.array(found, np.int64)
        done += count
    return first, sizes, rows, document


def best_fit(sizes: list[int], capacity: int) -> tuple[list[int], int]:
    """Return the row of each piece, and the number of rows, by best fit decreasing.

    Every size is 1 to ``capacity``. Of pieces of one size the first goes first; of rows with the
    same room, the one that has had it for the shortest time.
    """
    open_rows: defaultdict[int, list[int]] = defaultdict(list)  # by the room that they have left
    rooms, count, found = 0, 0, [0] * len(sizes)  # ``rooms``: bit r is set where a row has room r
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[piece]
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row, count = capacity, count, count + 1
        found[piece] = row
        if room > size:
            open_rows[room - size].append(row)
            rooms |= 1 << (room - size)
    return found, count


def packed(rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
    """Return tokens, targets and mask ``[1, T]`` of rows laid one after another, and the pieces."""
    mask = np.concatenate([np.arange(len(r.inputs)) < r.counted for r in rows])
    lengths = itertools.chain.from_iterable(r.lengths for r in rows)
    ends = torch.tensor([0, *itertools.accumulate(lengths)])
    return (
        torch.from_numpy(np.concatenate([r.inputs for r in rows])[None]),
        torch.from_numpy(np.concatenate([r.targets for r in rows])[None]),
        torch.from_numpy(mask.astype(np.float32)[None]),
        Sequences(ends),
    )


def cut_documents(stream: TokenStream, seq_len: int) -> tuple[int, int]:
    """Return how many documents lie across an end of the stream's samples, and all of them."""
    cut = documents = done = 0
    for shard in stream.shards:  # not all at once: of large data they fill memory
        lengths = shard.document_lengths()
        ends = done + np.cumsum(lengths)
        cut += int(((ends - lengths) // seq_len != (ends - 1) // seq_len).sum())
        documents, done = documents + len(lengths), done + len(shard)
    return cut, documents


def describe_cuts(
    mixes: Sequence[Mix],
    streams: Mapping[str, TokenStream],
    packed: Mapping[tuple[str, int], PackedRows],
) -> str:
    """Return in words how many documents are cut by ends of sequences, by their length."""
    parts, rows = [], packed.values()
    for length in sorted({mix.seq_len for mix in mixes}):
        names = {name for mix in mixes if mix.seq_len == length for name in mix.names}
        found = [
            (packed[n, length].cut, packed[n, length].documents)
            if packed
            else cut_documents(streams[n], length)
            for n in names
        ]
        cut, documents = (sum(numbers) for numbers in zip(*found, strict=True))
        parts.append(f"{cut / max(documents, 1):.1%} by sequences of {length:,}")
    words = f"documents cut: {', '.join(parts)}"
    if not packed:
        return words
    empty = 1 - sum(len(p.stream) for p in rows) / sum(len(p) * p.seq_len for p in rows)
    return f"{words}; {empty:.2%} of their tokens are empty"
