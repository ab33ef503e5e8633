"""Reading the batches of the next step while the step at hand is trained on."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import TracebackType

import torch

from pretrain.data.batch import Batch
from pretrain.data.batches import TrainingBatches
from pretrain.data.order import Offset
from pretrain.parallel.background import in_background

_SECONDS_TO_END = 10.0  # for a read at the end; a file system that hangs shall not hold the process


class ReadAhead:
    """A context that gives the same micro-batches as ``batches``, of which a thread reads the next.

    One step ahead, for steps below ``num_steps``. Batches are known by all that they depend on:
    those of another step, or of data from before a rollback, are dropped, and the ones that are
    asked for are read. What reading raises is raised where the batch is asked for, so an error in
    one that nobody asks for is none.
    """

    def __init__(self, batches: TrainingBatches, num_steps: int):
        self._batches, self._num_steps = batches, num_steps
        self._key: tuple[int, int, int, Offset] | None = None  # of what is being read
        self._read: Future[list[Batch]] | None = None
        self._thread: threading.Thread | None = None

    def micro_batches(
        self, step: int, rank: int = 0, size: int = 1, *, offset: Offset = 0
    ) -> list[Batch]:
        """Return :meth:`TrainingBatches.micro_batches`, and begin to read those of the next step.

        On a machine with a GPU they are in pinned memory, which it copies from while others work.
        """
        if self._key != (step, rank, size, offset):
            self._begin(step, rank, size, offset)
        assert self._read is not None
        read, self._key, self._read = self._read, None, None
        found = read.result()
        if step + 1 < self._num_steps:
            self._begin(step + 1, rank, size, offset)
        return found

    def _begin(self, step: int, rank: int, size: int, offset: Offset) -> None:
        if self._thread is not None:
            self._thread.join()  # one read at a time

        def read() -> list[Batch]:
            found = self._batches.micro_batches(step, rank, size, offset=offset)
            return [batch.pinned() for batch in found] if torch.cuda.is_available() else found

        self._key = (step, rank, size, offset)
        self._read, self._thread = in_background(read, "read-ahead")

    def __enter__(self) -> ReadAhead:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop what was read ahead, and wait for the thread: nothing reads after the run."""
        self._key = self._read = None
        if self._thread is not None:
            self._thread.join(_SECONDS_TO_END)
            self._thread = None
