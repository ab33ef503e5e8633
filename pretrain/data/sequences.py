"""Packed sequences: where the documents in a row of tokens begin and end, and all that follows.

A :class:`Sequences` is made once per batch and passed through the model as it is. What layers and
ops derive from it (lengths on the host, positions, cuts into chunks, rotary angles, ...) is
computed once and kept on the object, so it lives exactly as long as the batch does.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from pretrain.data.chunk_layout import ChunkLayout, chunk_layout

R = TypeVar("R")


class Sequences:
    """N sequences packed one after another in a row of T tokens; immutable.

    ``cu_seqlens`` is an int32 or int64 tensor ``[N + 1]``: 0, then the running sum of the lengths.
    It must not be changed in place. Raises ValueError for a tensor that is none such, TypeError for
    what is no tensor; its values are checked when they are first read on the host, where a GPU has
    to be waited for.
    """

    __slots__ = (
        *("_cu_seqlens", "_derived", "_device", "_lengths", "_row_length"),
        *("prefixes", "segment"),
    )

    segment: Segment | None
    """The row that these are a segment of; None: a whole row."""
    prefixes: tuple[int, ...] | None
    """How many of each sequence's first tokens layers may see from its start on, as far as they
    look ahead at all (see :meth:`with_prefixes`); None: as many as they can."""

    def __init__(self, cu_seqlens: Tensor):
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(
                f"cu_seqlens is a {type(cu_seqlens).__name__}, expected a tensor [N + 1]; "
                "Sequences.from_lengths takes a list of lengths"
            )
        whole = cu_seqlens.dtype in (torch.int32, torch.int64)
        if cu_seqlens.ndim != 1 or len(cu_seqlens) == 0 or not whole:
            raise ValueError(
                f"cu_seqlens must be a vector of integers [N + 1], int32 or int64, found "
                f"{tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
            )
        self._cu_seqlens: Tensor | None = cu_seqlens
        self._device = cu_seqlens.device
        self._lengths: list[int] | None = None
        self._row_length: int | None = None
        self._derived: dict[tuple[Any, ...], Any] = {}
        self.segment, self.prefixes = None, None

    @classmethod
    def from_lengths(cls, lengths: Iterable[int], device: torch.device | str = "cpu") -> Sequences:
        """Return sequences of these ``lengths``, whose ``cu_seqlens`` (int64) is on ``device``.

        Nothing waits for the device. Raises ValueError for a negative length.
        """
        known = list(lengths)
        if min(known, default=0) < 0:
            raise ValueError(f"lengths of sequences must be at least 0, found {known[:20]}")
        return cls._known(known, torch.device(device))

    @classmethod
    def of_rows(cls, batch_size: int, length: int, device: torch.device | str) -> Sequences:
        """Return ``batch_size`` rows of ``length`` tokens each, laid one after another."""
        rows = cls._known([length] * batch_size, torch.device(device))
        rows._row_length = length
        return rows

    @classmethod
    def _known(cls, lengths: list[int], device: torch.device) -> Sequences:
        made = cls.__new__(cls)
        made._cu_seqlens, made._device, made._lengths = None, device, lengths
        made._row_length, made._derived, made.segment, made.prefixes = None, {}, None, None
        return made

    def __repr__(self) -> str:
        return f"Sequences({self.count} on {self.device})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Sequences:
        return self  # immutable

    def derive(self, function: Callable[..., R], *arguments: Any) -> R:
        """Return ``function(self, *arguments)``, computed once and kept on this object.

        For what an op needs again and again: index tensors, tiles, rotary angles. ``function`` must
        be one defined at module level (it is half of the key, so a new lambda in every call would
        never be found again), ``arguments`` hashable; nobody may change the result in place. It is
        computed outside inference mode, so that it serves training too.
        """
        key = (function, *arguments)
        if key not in self._derived:
            with torch.inference_mode(False):
                self._derived[key] = function(self, *arguments)
        return cast(R, self._derived[key])

    @property
    def device(self) -> torch.device:
        """Return the device of ``cu_seqlens`` and of the tensors derived from it."""
        return self._device

    @property
    def cu_seqlens(self) -> Tensor:
        """Return ``[N + 1]``: 0, then where each sequence ends."""
        if self._cu_seqlens is None:
            with torch.inference_mode(False):
                if self._row_length is None:
                    self._cu_seqlens = without_waiting(self.on_host, self.device)
                else:  # a GPU makes them itself
                    rows = torch.arange(self.count + 1, device=self.device, dtype=torch.int64)
                    self._cu_seqlens = rows * self._row_length
        return self._cu_seqlens

    @property
    def count(self) -> int:
        """Return the number N of sequences, empty ones included."""
        return len(self.cu_seqlens) - 1 if self._lengths is None else len(self._lengths)

    @property
    def lengths(self) -> list[int]:
        """Return the N lengths, on the host. Raises ValueError where ``cu_seqlens`` falls."""
        if self._lengths is None:
            ends = self.cu_seqlens.tolist()
            lengths = [b - a for a, b in itertools.pairwise(ends)]
            if ends[0] != 0 or min(lengths, default=0) < 0:
                raise ValueError(f"cu_seqlens must start at 0 and never fall, found {ends[:20]}")
            self._lengths = lengths
        return self._lengths

    @property
    def on_host(self) -> Tensor:
        """Return ``cu_seqlens`` ``[N + 1]`` in int64 on the CPU."""
        return self.derive(_on_host)

    @property
    def sizes(self) -> Tensor:
        """Return ``[N]``: the lengths, on the device and in the dtype of ``cu_seqlens``."""
        return self.derive(_sizes)

    @property
    def sizes_so_far(self) -> Tensor:
        """Return ``[N]``: the lengths, of a segment's first piece with what lies before it."""
        return self.derive(_sizes_so_far)

    @property
    def num_tokens(self) -> int:
        """Return the number T of tokens of all sequences."""
        return self.derive(_num_tokens)

    @property
    def max_length(self) -> int:
        """Return the length of the longest sequence, 0 where there is none."""
        return self.derive(_max_length)

    @property
    def ids(self) -> Tensor:
        """Return ``[T]`` int64: the number of the sequence that each token belongs to."""
        return self.derive(_ids)

    @property
    def positions(self) -> Tensor:
        """Return ``[T]`` int64: each token's position within its sequence, from 0.

        In a segment of a row the first sequence may have begun before.
        """
        return self.derive(_positions)

    def last_tokens(self, count: int) -> Tensor:
        """Return the indices (int64) of each sequence's last ``count`` tokens, or of all it has."""
        return self.derive(_last_tokens, count)

    def chunk_layout(self, chunk_size: int) -> ChunkLayout:
        """Return how the sequences are cut into chunks; empty sequences have no chunk."""
        return self.derive(chunk_layout, chunk_size)

    def to(self, device: torch.device | str) -> Sequences:
        """Return the same sequences on ``device``, this object itself if it is there.

        Their lengths stay known, so that no layer has to wait for the device to learn them.
        """
        device = torch.device(device)
        if self._cu_seqlens is None:
            if device == self.device:
                return self
            moved = Sequences._known(self.lengths, device)
            moved._row_length = self._row_length
            return moved._like(self)
        cu_seqlens = without_waiting(self._cu_seqlens, device)
        if cu_seqlens is self._cu_seqlens:
            return self
        moved = Sequences(cu_seqlens)
        moved._lengths = self.lengths
        return moved._like(self)

    def pinned(self) -> Sequences:
        """Return the same sequences, which are on the CPU, in pinned memory; lengths are known."""
        pinned = Sequences(self.cu_seqlens.pin_memory())
        pinned._lengths = self.lengths
        return pinned._like(self)

    def with_prefixes(self, prefixes: Iterable[int]) -> Sequences:
        """Return the same sequences with a prefix each, of so many tokens.

        Raises ValueError unless there is one for each sequence, not longer than it.
        """
        known = tuple(prefixes)
        if len(known) != self.count or not all(
            0 <= prefix <= length for prefix, length in zip(known, self.lengths, strict=False)
        ):
            raise ValueError(
                f"prefixes are {list(known[:20])}, expected one for each of {self.count} sequences "
                f"of lengths {self.lengths[:20]}, and none longer than its sequence"
            )
        made = Sequences._known(self.lengths, self.device)
        made._cu_seqlens, made._row_length = self._cu_seqlens, self._row_length
        made._like(self).prefixes = known
        return made

    def _like(self, other: Sequences) -> Sequences:
        """Take over what ``other``, of the same lengths, says beside them; return self."""
        self.segment, self.prefixes = other.segment, other.prefixes
        return self


@dataclass(frozen=True)
class Segment:
    """One of ``size`` contiguous parts, of equally many tokens, of a packed row.

    Its tokens hold pieces of the row's sequences. What is said of every segment is known to all
    ranks alike, without communication.

    Attributes:
        row: The sequences of the whole row, on the host.
        rank: This segment's number.
        size: How many segments there are.
        seen: Tokens of the first piece's sequence before this segment.
        continues: For each segment, whether its first token is not the first of its sequence.
        through: For each segment, whether no sequence begins in it, at its first token included.
        group: The context-parallel ranks, of which each has one segment; None: they follow one
            another on one process.
        ring: Whether states of recurrences that are linear in them go from rank to rank, each of
            which waits for the one before; otherwise all ranks gather those of all.
    """

    row: Sequences
    rank: int
    size: int
    seen: int
    continues: tuple[bool, ...]
    through: tuple[bool, ...]
    group: Any = None
    ring: bool = False

    def crosses(self, by: int) -> bool:
        """Return whether a sequence goes on over this segment's start (-1) or end (+1)."""
        border = self.rank + (by > 0)
        return border < self.size and self.continues[border]


def segment_of(
    row: Sequences, rank: int, size: int, group: Any = None, *, ring: bool = False
) -> Sequences:
    """Return the pieces of ``row``'s sequences in its segment ``rank`` of ``size``.

    Empty sequences are left out; a piece's prefix is its part of the sequence's. Raises ValueError
    where ``size`` does not divide the tokens.
    """
    total = row.num_tokens
    if total % size:
        raise ValueError(
            f"a row of {total} tokens cannot be cut into {size} segments of equal size"
        )
    length = total // size
    ends = list(itertools.accumulate(row.lengths))
    starts = {end - n for n, end in zip(row.lengths, ends, strict=True) if n}
    borders = [number * length for number in range(size)]
    continues = tuple(border not in starts for border in borders)
    through = tuple(not any(b <= start < b + length for start in starts) for b in borders)
    first, last = borders[rank], borders[rank] + length
    cuts = [first, *sorted(s for s in starts if first < s < last), last]
    pieces = Sequences.from_lengths((b - a for a, b in itertools.pairwise(cuts)), row.device)
    seen = first - max((s for s in starts if s <= first), default=0)
    pieces.segment = Segment(row.to("cpu"), rank, size, seen, continues, through, group, ring)
    if row.prefixes is not None:
        lengths = zip(row.lengths, ends, row.prefixes, strict=True)
        prefix_ends = {end - n: end - n + prefix for n, end, prefix in lengths if n}
        known = sorted(prefix_ends)
        begins = [known[bisect.bisect_right(known, cut) - 1] for cut in cuts[:-1]]
        pieces.prefixes = tuple(
            min(max(prefix_ends[begin] - a, 0), b - a)
            for begin, (a, b) in zip(begins, itertools.pairwise(cuts), strict=True)
        )
    return pieces


def given_sequences(
    what: str, sequences: Sequences | Tensor | None, cu_seqlens: Tensor | None
) -> Sequences | None:
    """Return the sequences that a caller of ``what`` named by either keyword, None if by neither.

    A tensor stands for ``Sequences(tensor)``. Raises ValueError where both are given, TypeError for
    what is neither.
    """
    if sequences is not None and cu_seqlens is not None:
        raise ValueError(f"{what}: sequences and cu_seqlens are both given, expected one of them")
    given = cu_seqlens if sequences is None else sequences
    if given is None or isinstance(given, Sequences):
        return given
    if not isinstance(given, Tensor):
        name = "cu_seqlens" if sequences is None else "sequences"
        raise TypeError(
            f"{what}: {name} is a {type(given).__name__}, expected a Sequences or a tensor [N + 1]"
        )
    return Sequences(given)


def check_fits(what: str, sequences: Sequences, batch_size: int, length: int) -> None:
    """Raise ValueError unless ``sequences`` are those of one row of ``length`` tokens."""
    if batch_size != 1:
        raise ValueError(f"{what}: with cu_seqlens the batch must be 1, found {batch_size}")
    if sequences.num_tokens != length:
        raise ValueError(
            f"{what}: cu_seqlens ends at {sequences.num_tokens}, but there are {length} tokens"
        )


def _on_host(sequences: Sequences) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sequences.lengths)], device="cpu")


def _sizes(sequences: Sequences) -> Tensor:
    return sequences.cu_seqlens.diff()


def _sizes_so_far(sequences: Sequences) -> Tensor:
    sizes = sequences.sizes
    if sequences.segment is not None and sequences.segment.seen:
        sizes = sizes.clone()
        sizes[0] += sequences.segment.seen
    return sizes


def _num_tokens(sequences: Sequences) -> int:
    return sum(sequences.lengths)


def _max_length(sequences: Sequences) -> int:
    return max(sequences.lengths, default=0)


def _ids(sequences: Sequences) -> Tensor:
    return torch.repeat_interleave(sequences.sizes.long(), output_size=sequences.num_tokens)


def _positions(sequences: Sequences) -> Tensor:
    ids = sequences.ids
    positions = torch.arange(len(ids), device=ids.device) - sequences.cu_seqlens.long()[ids]
    if sequences.segment is not None and sequences.segment.seen:
        positions[ids == 0] += sequences.segment.seen
    return positions


def _last_tokens(sequences: Sequences, count: int) -> Tensor:
    ends = itertools.accumulate(sequences.lengths)
    parts = [
        torch.arange(end - min(n, count), end, device="cpu")
        for n, end in zip(sequences.lengths, ends, strict=True)
    ]
    return without_waiting(torch.cat(parts or [torch.arange(0, device="cpu")]), sequences.device)


def without_waiting(x: Tensor, device: torch.device) -> Tensor:
    """Return ``x``, which is on the CPU, on ``device``, copied asynchronously to a GPU."""
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def select_packed(x: Tensor, lengths: Tensor, indices: Tensor) -> Tensor:
    """Select some of the sequences that are packed along x's first axis.

    ``lengths`` ``[N]`` are those of all; the result holds the sequences of ``indices`` ``[M]``
    (int64), in that order, packed likewise.
    """
    chosen = lengths[indices]
    starts = (lengths.cumsum(0) - lengths)[indices]
    within = torch.arange(int(chosen.sum()), device=x.device)
    within = within - torch.repeat_interleave(chosen.cumsum(0) - chosen, chosen)
    return x[torch.repeat_interleave(starts, chosen) + within]


def pieces_alone(sequences: Sequences) -> Sequences:
    """Return a segment's pieces of sequences as if each were a sequence by itself.

    For what goes on from a state, which knows itself how many tokens came before.
    """
    return sequences.derive(_pieces_alone)


def _pieces_alone(sequences: Sequences) -> Sequences:
    return Sequences.from_lengths(sequences.lengths, sequences.device)
