"""The order of a run's samples: a function of the seed and of what phases have read before.

A source is cut into windows of equally many tokens, whose pseudorandom order is a new one every
epoch. A sample is a window, or a piece of one where a phase of the run has shorter sequences;
pieces of a window follow one another. What phases have read of a source is counted by its name,
which has the hash of its content, so that a later mix goes on where an earlier one stopped.

Where later windows have another length than those before, as in a run that goes on with sequences
longer than it was planned for, they come in an order of their own, and those of which anything was
read in the epoch are passed over until no other is left.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

# Tokens of data that rollbacks skipped, each with the step that they were skipped from; a number
# stands for so many at the beginning of the run.
Offset = int | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Mix:
    """Consecutive steps with samples of one length, of the same sources in the same shares.

    Attributes:
        first: The first step.
        last: The step after the last one; None: there is no end.
        seq_len: Tokens of a sample.
        window: Tokens of a window, a multiple of them.
        names: The sources.
        weights: Their shares, with a sum of 1.
        windows: Windows of each.
    """

    first: int
    last: int | None
    seq_len: int
    window: int
    names: list[str]
    weights: list[Fraction]
    windows: list[int]

    def has(self, step: int) -> bool:
        """Return whether a step is one of them."""
        return self.first <= step and (self.last is None or step < self.last)

    def skipped(self, offset: Offset) -> int:
        """Return the tokens of its data that rollbacks skipped."""
        skips = ((0, offset),) if isinstance(offset, int) else offset
        return sum(tokens for step, tokens in skips if self.has(step))


@dataclass(frozen=True)
class Used:
    """The first ``taken`` of ``count`` windows of so many tokens, by the order of ``key``."""

    window: int
    count: int
    key: bytes
    taken: int

    def overlaps(self, start: int, end: int) -> bool:
        """Return whether one of them has a token from ``start`` to ``end``."""
        first, last = start // self.window, min(-(-end // self.window), self.count)
        return any(unpermute(n, self.count, self.key) < self.taken for n in range(first, last))


@dataclass(frozen=True)
class Progress:
    """What was read of a source: so many tokens of its windows, in the order of an epoch and on.

    ``used``: what was read in that epoch before, in windows of other lengths.
    """

    window: int
    count: int
    epoch: int = 0
    read: int = 0
    used: tuple[Used, ...] = ()


class Order:
    """The order of the samples of several mixes, one after another."""

    reads_on = False
    """Whether rows read on from step to step."""

    def __init__(self, mixes: Sequence[Mix], seed: int):
        self.mixes, self.seed = mixes, seed
        self._free: dict[tuple[str, Progress], Free] = {}

    def span(self, mix: Mix, index: int) -> tuple[int, int]:
        """Return the number of what a row reads without a break, and the sample's place in it."""
        return index, 0

    def locate(self, mix: Mix, index: int, before: Sequence[Progress]) -> tuple[int, int, int]:
        """Return (source, window of it, first token within that) of sample ``index`` of a mix.

        ``before``: what was read of each of its sources before, see :meth:`before`.
        """
        source, position = blend(index, mix.weights)
        progress, name = before[source], mix.names[source]
        number, token = divmod(progress.read + position * mix.seq_len, mix.window)
        epoch = progress.epoch
        if progress.used:
            free = self._free_windows(name, progress)
            found = free.at(number)
            if found is not None:
                return source, found, token
            number, epoch = number - len(free.found), epoch + 1
        more, number = divmod(number, progress.count)
        return source, permute(number, progress.count, self._key(name, epoch + more)), token

    def before(self, mix: Mix, tokens: Sequence[int]) -> list[Progress]:
        """Return what the mixes before a mix have read of each of its sources.

        ``tokens`` are those of each mix before it. What was read is rounded up to whole samples.
        """
        known: dict[str, Progress] = {}
        for each, total in zip(self.mixes, [*tokens, 0], strict=False):
            found = [
                self._going_on(name, known.get(name), each, count)
                for name, count in zip(each.names, each.windows, strict=True)
            ]
            if each is mix:
                return found
            read = self._read_of(each, total // each.seq_len)
            for name, progress, tokens_read in zip(each.names, found, read, strict=True):
                known[name] = replace(progress, read=progress.read + tokens_read)
        raise ValueError("the mix is none of the order's")

    def _read_of(self, mix: Mix, samples: int) -> list[int]:
        """Return how many tokens the first samples of a mix read of each of its sources."""
        return [count * mix.seq_len for count in shares_of(samples, mix.weights)]

    def _going_on(self, name: str, progress: Progress | None, mix: Mix, count: int) -> Progress:
        """Return where a mix begins to read a source, of which it has ``count`` windows."""
        if progress is None:
            return Progress(mix.window, count)
        if progress.window == mix.window:
            return replace(progress, read=-(-progress.read // mix.seq_len) * mix.seq_len)
        number, epoch, used = -(-progress.read // progress.window), progress.epoch, progress.used
        key, ordered = self._key(name, epoch), progress.count
        if used:
            free = self._free_windows(name, progress)
            if number == 0 or free.at(number - 1) is not None:
                key, number, ordered = free.key, free.candidates(number), free.count
            else:
                number, epoch, used = number - len(free.found), epoch + 1, ()
        if not used:
            more, number = divmod(number, progress.count)
            epoch += more
            key = self._key(name, epoch)
        if number:
            used = (*used, Used(progress.window, ordered, key, number))
        return Progress(mix.window, count, epoch, 0, used)

    def _free_windows(self, name: str, progress: Progress) -> Free:
        begun = replace(progress, read=0)
        if (name, begun) not in self._free:
            key = self._key(name, progress.epoch, progress.window)
            self._free[name, begun] = self._find_free(name, begun, key)
        return self._free[name, begun]

    def _find_free(self, name: str, progress: Progress, key: bytes) -> Free:
        return FreeWindows(progress, key)

    def _key(self, name: str, *numbers: int) -> bytes:
        text = ":".join(map(str, (self.seed, name, *numbers)))
        return hashlib.sha256(text.encode()).digest()


class Free(ABC):
    """Order what is left of a source in an epoch, by ``key``.

    Attributes:
        count: How many windows are ordered.
        found: Those of which nothing was read, as far as they are known.
    """

    found: Sequence[int]

    def __init__(self, progress: Progress, key: bytes):
        self.progress, self.key, self.count = progress, key, progress.count

    @abstractmethod
    def at(self, number: int) -> int | None:
        """Return the window of a number, None where there are fewer."""

    @abstractmethod
    def candidates(self, number: int) -> int:
        """Return how many windows of the order are the first ``number`` free ones, and others."""


class FreeWindows(Free):
    """The windows of which nothing was read, found as they are needed."""

    def __init__(self, progress: Progress, key: bytes):
        super().__init__(progress, key)
        self.found: list[int] = []
        self._candidates: list[int] = []  # how many were looked at up to each
        self._next = 0

    def at(self, number: int) -> int | None:
        """Return the window of a number, None where there are fewer."""
        progress = self.progress
        while len(self.found) <= number and self._next < progress.count:
            window = permute(self._next, progress.count, self.key)
            start, self._next = window * progress.window, self._next + 1
            if not any(u.overlaps(start, start + progress.window) for u in progress.used):
                self.found.append(window)
                self._candidates.append(self._next)
        return self.found[number] if number < len(self.found) else None

    def candidates(self, number: int) -> int:
        """Return how many windows of the order are the first ``number`` free ones, and others."""
        return self._candidates[number - 1] if number else 0


def blend(index: int, weights: Sequence[Fraction]) -> tuple[int, int]:
    """Return (source, position within it) of sample ``index``; ``weights`` sum to 1.

    The first source takes sample i whenever floor(w (i + 1)) > floor(w i), the others share the
    rest in the same way: for any prefix, every share is exact to within len(weights) samples.
    """
    rest = Fraction(1)
    for source, weight in enumerate(weights[:-1]):
        share = weight / rest
        before, after = index * share, (index + 1) * share
        taken = before.numerator // before.denominator
        if after.numerator // after.denominator > taken:
            return source, taken
        index, rest = index - taken, rest - weight
    return len(weights) - 1, index


def shares_of(count: int, weights: Sequence[Fraction]) -> list[int]:
    """Return how many of the first ``count`` samples of :func:`blend` are of each source."""
    rest, found = Fraction(1), []
    for weight in weights[:-1]:
        share = count * weight / rest
        found.append(share.numerator // share.denominator)
        count, rest = count - found[-1], rest - weight
    return [*found, count]


_ROUNDS = 4


def permute(position: int, count: int, key: bytes) -> int:
    """Return the image of ``position`` under a pseudorandom permutation of ``range(count)``.

    A Feistel network of four rounds on the next power of four, walked along its cycle until the
    value falls below ``count``.
    """
    half = _half_bits(count)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for r in range(_ROUNDS):
            left, right = right, left ^ _round(key, r, right, mask)
        position = left << half | right
        if position < count:
            return position


def unpermute(image: int, count: int, key: bytes) -> int:
    """Return the position whose image under :func:`permute` is ``image``."""
    half = _half_bits(count)
    mask = (1 << half) - 1
    while True:
        left, right = image >> half, image & mask
        for r in reversed(range(_ROUNDS)):
            left, right = right ^ _round(key, r, left, mask), left
        image = left << half | right
        if image < count:
            return image


def _half_bits(count: int) -> int:
    return max((count - 1).bit_length() + 1, 2) // 2


def _round(key: bytes, number: int, value: int, mask: int) -> int:
    text = key + bytes([number]) + value.to_bytes(8, "little")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") & mask
