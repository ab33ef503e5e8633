"""Token shards, read so that a file which is cut short or altered ends in a sentence."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pretrain.common.errors import UserError


class Shard:
    """One shard ``PREFIX.bin`` and ``PREFIX.idx``: its documents' ids, one after another.

    The ids are read by position, not through the file mapped into memory: where a mapped file is
    cut short, the kernel kills the process that reads it. Raises UserError where the files are no
    shard or do not fit together.
    """

    def __init__(self, prefix: Path, vocab_size: int):
        self.prefix, self.vocab_size = prefix, vocab_size
        self.path = prefix.with_name(f"{prefix.name}.bin")
        self.dtype, lengths = self._index()
        self._tokens = int(lengths.sum(dtype=np.int64))
        try:
            self._file = self.path.open("rb", buffering=0)
            size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        if size != self._tokens * self.dtype.itemsize:
            raise UserError(
                f"{self.path} has {size} bytes, but {prefix.name}.idx says {self._tokens} tokens "
                f"of {self.dtype.itemsize} bytes; {self._advice}"
            )

    def __len__(self) -> int:
        """Return the number of tokens."""
        return self._tokens

    def document_lengths(self) -> np.ndarray:
        """Return the tokens of every document, ``[documents]`` int64."""
        return self._index()[1].astype(np.int64)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return the ``count`` ids from token ``start`` on, in the shard's type.

        Raises UserError where the file ends before them, cannot be read, or has an id that the
        vocabulary does not.
        """
        size, offset = count * self.dtype.itemsize, start * self.dtype.itemsize
        file = self._file.fileno()
        try:
            content = more = os.pread(file, size, offset)
            while more and len(content) < size:  # a system call reads 2 GB at most
                more = os.pread(file, size - len(content), offset + len(content))
                content += more
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}") from None
        if len(content) < size:
            raise UserError(
                f"{self.path} was cut short while it was in use: it has {os.fstat(file).st_size} "
                f"bytes, expected {self._tokens * self.dtype.itemsize}; {self._advice}"
            )
        found = np.frombuffer(content, self.dtype)
        unsigned = found.view(f"u{self.dtype.itemsize}")  # where negative ids are large ones
        if count and int(unsigned.max()) >= self.vocab_size:
            at = int((unsigned >= self.vocab_size).argmax())
            raise UserError(
                f"{self.path}: token {start + at} is {found[at]}, expected an id from 0 to "
                f"{self.vocab_size - 1} of the tokenizer; {self._advice}"
            )
        return found

    @property
    def _advice(self) -> str:
        return (
            "bring back the file, or make the data again (python -m data_prep verify "
            f"{self.prefix.parent} names every file that has changed)"
        )

    def _index(self) -> tuple[np.dtype, np.ndarray]:
        """Return the type of the ids and the documents' lengths, by megatron-core's reader."""
        # Not through IndexedDataset, whose destructor complains of an index that it cannot read.
        from megatron.core.datasets.indexed_dataset import _IndexReader

        try:
            index = _IndexReader(f"{self.prefix}.idx", multimodal=False)
            # A copy: the lengths are a view of a file that is unmapped along with the index.
            return np.dtype(index.dtype), np.array(index.sequence_lengths)
        except (AssertionError, OSError, ValueError, struct.error) as error:
            raise UserError(f"{self.prefix}.idx is no index of a shard ({error})") from None


class TokenStream:
    """The tokens of some shards, one after another."""

    def __init__(self, shards: Sequence[Shard]):
        self.shards = shards
        self._ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def document_lengths(self) -> np.ndarray:
        """Return the tokens of every document, ``[documents]`` int64."""
        parts = [shard.document_lengths() for shard in self.shards]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def read(self, start: int, count: int) -> np.ndarray:
        """Return ``count`` ids from token ``start`` on, ``[count]`` int64; see Shard.read."""
        parts = []
        while count > 0:
            number = int(np.searchsorted(self._ends, start, side="right"))
            taken = min(count, int(self._ends[number]) - start)
            first = start - (int(self._ends[number - 1]) if number else 0)
            parts.append(self.shards[number].read(first, taken))
            start, count = start + taken, count - taken
        return np.concatenate(parts).astype(np.int64)
