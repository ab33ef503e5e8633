"""The order of rows that documents are packed in (``data.packing: best_fit``), over all phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pretrain.data.order import Free, Mix, Order, Progress, Used, permute
from pretrain.data.packing import PackedRows, Row


class PackedOrder(Order):
    """Rows of one length come in a pseudorandom order of all of them.

    Where a mix has rows of another length than the one before it, what is left of the documents is
    packed anew in rows of that length. They are numbered behind the rows of all documents, and come
    in an order of their own; when they are used up, the next epoch has the rows of all documents.

    ``packed``: the rows of all documents, by source and length.
    """

    def __init__(
        self, mixes: Sequence[Mix], seed: int, packed: Mapping[tuple[str, int], PackedRows]
    ):
        super().__init__(mixes, seed)
        self._packed = packed
        self._left: dict[tuple[str, tuple[Used, ...], int], PackedRows] = {}

    def read(self, mix: Mix, index: int, before: Sequence[Progress]) -> Row:
        """Return sample ``index`` of a mix, see :meth:`locate`."""
        source, number, _ = self.locate(mix, index, before)
        name = mix.names[source]
        rows = self._packed[name, mix.seq_len]
        if number < len(rows):
            return rows.read(number)
        return self._left_of(name, before[source].used, mix.seq_len).read(number - len(rows))

    def _find_free(self, name: str, progress: Progress, key: bytes) -> Free:
        return _FreeRows(progress, key, self._left_of(name, progress.used, progress.window))

    def _left_of(self, name: str, used: tuple[Used, ...], seq_len: int) -> PackedRows:
        """Return what is left of a source's documents, in rows of ``seq_len`` tokens."""
        if not used:
            return self._packed[name, seq_len]
        if (name, used, seq_len) not in self._left:
            last = used[-1]
            rows = self._left_of(name, used[:-1], last.window)
            self._left[name, used, seq_len] = rows.without(_numbers(last), seq_len)
        return self._left[name, used, seq_len]


class _FreeRows(Free):
    """The rows that what is left of the documents was packed in, all known at once."""

    def __init__(self, progress: Progress, key: bytes, rows: PackedRows):
        super().__init__(progress, key)
        self.count, self.found = len(rows), range(len(rows))

    def at(self, number: int) -> int | None:
        """Return the row of a number, None where there are fewer."""
        if number >= self.count:
            return None
        return self.progress.count + permute(number, self.count, self.key)

    def candidates(self, number: int) -> int:
        """Return ``number``: there are no others."""
        return number


def _numbers(used: Used) -> np.ndarray:
    """Return which rows were read, as a mask of all."""
    most = 2 * used.taken > used.count
    fewer = range(used.taken, used.count) if most else range(used.taken)
    mask = np.full(used.count, most)
    mask[[permute(number, used.count, used.key) for number in fewer]] = not most
    return mask
