"""Worker processes that turn batches of documents into batches of tokens.

This module imports little (numpy and the tokenizer), because every worker imports it again.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from data_prep.tokenizer_training import is_validation
from pretrain.common.errors import UserError
from pretrain.data.tokenizer import Tokenizer

T = TypeVar("T")
U = TypeVar("U")

SPLITS = ("train", "valid")


@dataclass
class SplitTokens:
    """The tokens of one split's documents in a batch."""

    tokens: npt.NDArray[Any]  # [tokens], documents one after the other, each ending with eod
    lengths: npt.NDArray[np.int64]  # [documents], in tokens
    text_bytes: int


@dataclass
class TokenizedBatch:
    """A worker's result for one batch of documents."""

    splits: dict[str, SplitTokens]
    skipped: dict[str, int]
    unigrams: npt.NDArray[np.int64]  # [256] counts of bytes
    bigrams: npt.NDArray[np.int64]  # [65536] counts of pairs in documents: first * 256 + second
    text_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.text_bytes = sum(split.text_bytes for split in self.splits.values())


def tokenize(
    documents: list[bytes], tokenizer_path: str, validation_fraction: float
) -> TokenizedBatch:
    """Tokenize a batch; documents that are empty or not UTF-8 are counted and skipped."""
    tokenizer = _tokenizer(tokenizer_path)
    skipped = {"undecodable": 0, "empty": 0}
    tokens: dict[str, list[npt.NDArray[Any]]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    kept = []
    end = np.array([tokenizer.eod_id], dtype=tokenizer.dtype)
    for document in documents:
        if not document:
            skipped["empty"] += 1
            continue
        try:
            text = document.decode()
        except UnicodeDecodeError:
            skipped["undecodable"] += 1
            continue
        split = SPLITS[is_validation(document, validation_fraction)]
        tokens[split].append(np.concatenate([tokenizer.encode_to_array(text), end]))
        text_bytes[split] += len(document)
        kept.append(document)
    unigrams, bigrams = count_bytes(kept)
    splits = {
        split: SplitTokens(
            np.concatenate(arrays) if arrays else end[:0],
            np.array([len(a) for a in arrays], dtype=np.int64),
            text_bytes[split],
        )
        for split, arrays in tokens.items()
    }
    return TokenizedBatch(splits, skipped, unigrams, bigrams)


def count_bytes(
    documents: list[bytes], slice_bytes: int = 1 << 20
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Count the bytes ``[256]`` and the byte pairs ``[65536]`` within non-empty documents.

    Bytes are counted in slices of ``slice_bytes``, because bincount takes 8 times their memory.
    """
    text = np.frombuffer(b"".join(documents), dtype=np.uint8)
    bigrams = np.zeros(65_536, dtype=np.int64)
    for start in range(0, len(text) - 1, slice_bytes):
        part = text[start : start + slice_bytes + 1]
        bigrams += np.bincount(part[:-1].astype(np.uint16) << 8 | part[1:], minlength=65_536)
    ends = np.cumsum([len(document) for document in documents])[:-1]
    across = text[ends - 1].astype(np.uint16) << 8 | text[ends] if len(ends) else []
    np.subtract.at(bigrams, across, 1)
    unigrams = np.zeros(256, dtype=np.int64)
    for start in range(0, len(text), slice_bytes):
        unigrams += np.bincount(text[start : start + slice_bytes], minlength=256)
    return unigrams, bigrams


@lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return Tokenizer.load(path)


class WorkerPool:
    """Worker processes that die with this process, whatever ends it, and ignore Ctrl-C."""

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor = ProcessPoolExecutor(
            processes, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
        )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is None:
            self._executor.shutdown()
            return
        self._executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # their results are no longer needed
            process.kill()

    def submit(self, function: Callable[..., T], *arguments: Any) -> Future[T]:
        """Have a worker call ``function(*arguments)``."""
        # Processes start here, and inherit the blocked signals.
        with _signals_blocked():
            return self._executor.submit(function, *arguments)

    def result(self, future: Future[T]) -> T:
        """Wait for a future's value; raises :class:`UserError` when its worker was killed."""
        try:
            return future.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, most likely for lack of memory: free some or lower "
                "processes, then run the same command again to resume"
            ) from None

    def map(
        self, function: Callable[..., U], items: Iterable[tuple[tuple[Any, ...], T]]
    ) -> Iterator[tuple[U, T]]:
        """Yield ``(function(*arguments), label)`` for each ``(arguments, label)``, in order.

        Only a few items more than there are workers are submitted ahead.
        """
        waiting: list[tuple[Future[U], T]] = []
        for arguments, label in items:
            waiting.append((self.submit(function, *arguments), label))
            if len(waiting) > 2 * self.processes + 1:
                future, ready = waiting.pop(0)
                yield self.result(future), ready
        for future, ready in waiting:
            yield self.result(future), ready


_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def _start_worker() -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
