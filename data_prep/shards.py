"""Tokenize sources into Megatron shards in parallel; an interruption costs at most one shard.

The parent reads documents in order and sends batches to worker processes; results are consumed in
order, so the shards do not depend on the number of processes. A shard is written in
``OUTPUT/.partial``, moved to ``OUTPUT`` when complete, then listed in ``.partial/progress.json``:
a shard that is not listed there does not count. ``manifest.json`` comes last.
"""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.documents import Source
from data_prep.progress import Position, Progress
from data_prep.screen import ProgressDisplay
from data_prep.workers import SPLITS, TokenizedBatch, WorkerPool, tokenize
from pretrain.common.files import sync
from pretrain.data.manifest import Counts, ShardEntry
from pretrain.data.tokenizer import Tokenizer

BATCH_BYTES = 1_000_000


@dataclass(frozen=True)
class BatchEnd:
    """The reading position after a batch."""

    position: Position
    consumed: int  # units of work of the source, for the progress bar


def write_shards(
    sources: list[Source],
    tokenizer: Tokenizer,
    progress: Progress,
    output: Path,
    pool: WorkerPool,
    shard_bytes: int,
    validation_fraction: float,
    display: ProgressDisplay,
) -> None:
    """Write the shards that are still missing, bringing ``progress`` to the end of all sources."""
    for index in range(progress.position.source, len(sources)):
        source = sources[index]
        if index > progress.position.source:
            progress.position = Position(index)
        name = source.config.name
        sizes = source.sizes
        done = sum(sizes[: progress.position.file]) if sizes else 0
        display.start_source(name, sum(sizes) if sizes else None, done)
        writer = ShardWriter(output, name, progress.next_index(name), tokenizer.dtype)
        batches = (
            ((documents, str(tokenizer.path), validation_fraction), end)
            for documents, end in read_batches(
                source, progress.position, min(BATCH_BYTES, shard_bytes)
            )
        )
        end = None
        try:
            for batch, end in pool.map(tokenize, batches):
                writer.add(batch)
                progress.count(name, batch)
                documents = sum(len(split.lengths) for split in batch.splits.values())
                display.advance(documents, batch.text_bytes, end.consumed)
                if writer.text_bytes >= shard_bytes:
                    progress.add(writer.finish(), end.position)
            if end is not None:
                progress.add(writer.finish(), end.position)
        finally:
            writer.abandon()


def read_batches(
    source: Source, start: Position, batch_bytes: int
) -> Iterator[tuple[list[bytes], BatchEnd]]:
    """Yield batches of documents from ``start`` on; a batch ends once it has ``batch_bytes``.

    A batch begins where the previous one ended, so that a resumed run cuts the same batches as an
    uninterrupted one.
    """
    limit = source.config.max_documents
    sizes = source.sizes
    position, batch, size = start, [], 0
    done = sum(sizes[: start.file]) if sizes else 0
    for file in range(start.file, source.file_count):
        skip = start.documents if file == start.file else 0
        position = dataclasses.replace(position, file=file, documents=skip)
        consumed = 0
        for document in source.read(file, skip):
            if limit is not None and position.total >= limit:
                break
            batch.append(document.content)
            size += len(document.content)
            consumed = document.consumed
            position = dataclasses.replace(
                position, documents=position.documents + 1, total=position.total + 1
            )
            # Empty documents count a little, so that a file full of them cannot fill the memory.
            if size + 100 * len(batch) >= batch_bytes:
                yield batch, BatchEnd(position, done + consumed)
                batch, size = [], 0
        done += sizes[file] if sizes else 0
        if limit is not None and position.total >= limit:
            break
    if batch:
        yield batch, BatchEnd(position, done)


class ShardWriter:
    """Write one source's shards, a train and a valid file side by side, through megatron-core."""

    def __init__(self, output: Path, source: str, index: int, dtype: np.dtype[Any]) -> None:
        self.output = output
        self.partial = output / ".partial"
        self.source = source
        self.index = index
        self.dtype = dtype
        self.text_bytes = 0
        self._builders: dict[str, Any] = {}
        self._counts: dict[str, Counts] = {}

    def add(self, batch: TokenizedBatch) -> None:
        """Append a batch's documents."""
        for split, part in batch.splits.items():
            if not len(part.lengths):
                continue
            if split not in self._builders:
                path = self.partial / f"{self._name(split)}.bin"
                self._builders[split] = indexed_dataset().IndexedDatasetBuilder(
                    str(path), dtype=self.dtype.type
                )
                self._counts[split] = Counts()
            builder = self._builders[split]
            ends = np.cumsum(part.lengths)
            for length, end in zip(part.lengths.tolist(), ends.tolist(), strict=True):
                builder.add_document(part.tokens[end - length : end], [length])
            self._counts[split].add(Counts(len(ends), len(part.tokens), part.text_bytes))
        self.text_bytes += batch.text_bytes

    def finish(self) -> list[ShardEntry]:
        """Move the shard, synced to disk, into the output, and begin the next one.

        Returns the shard's entries for the manifest, one for each split that has documents.
        """
        entries = []
        for split in SPLITS:
            if split not in self._builders:
                continue
            name = self._name(split)
            files = {suffix: self.partial / f"{name}.{suffix}" for suffix in ("bin", "idx")}
            self._builders.pop(split).finalize(str(files["idx"]))
            hashes, sizes = {}, {}
            for suffix, path in files.items():
                sync(path)
                sizes[suffix] = path.stat().st_size
                hashes[suffix] = file_hash(path)
                path.rename(self.output / path.name)
            counts = dataclasses.asdict(self._counts.pop(split))
            entries.append(
                ShardEntry(
                    name=name, source=self.source, split=split, sha256=hashes, size=sizes, **counts
                )
            )
        sync(self.output)
        self.index += 1
        self.text_bytes = 0
        return entries

    def abandon(self) -> None:
        """Close the files of an unfinished shard; the next run removes them."""
        for builder in self._builders.values():
            with suppress(OSError):  # a full disk shows again when the last buffer is written
                builder.data_file.close()
        self._builders.clear()

    def _name(self, split: str) -> str:
        return f"{split}-{self.source}-{self.index:05d}"


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def indexed_dataset() -> Any:
    """Import megatron-core's module for ``.bin/.idx`` files; the first call takes seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about optional GPU libraries, of no use here
        from megatron.core.datasets import indexed_dataset as module
    return module
