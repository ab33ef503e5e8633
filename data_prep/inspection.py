"""Inspect a finished data set, and verify its files against the manifest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from data_prep.screen import print_counts
from data_prep.shards import indexed_dataset
from pretrain.common.errors import UserError
from pretrain.data.manifest import Manifest
from pretrain.data.tokenizer import Tokenizer

_BAR = 40
_SAMPLES = 3
_SAMPLE_TOKENS = 200


def verify(directory: str | Path) -> None:
    """Compare every file with the manifest's hashes.

    Raises :class:`UserError`, naming them, when files are missing or damaged.
    """
    manifest = Manifest.load(directory)
    damaged = manifest.damaged_files(directory)
    if damaged:
        raise UserError("; ".join(damaged))
    print(f"{directory}: all {len(manifest.hashes)} files match the manifest")


def inspect(directory: str | Path) -> None:
    """Print counts, a histogram of document lengths, and the beginnings of some documents."""
    directory = Path(directory)
    manifest = Manifest.load(directory)
    manifest.verify_sizes(directory)
    tokenizer = Tokenizer.load(directory / manifest.tokenizer.file)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    print_counts(manifest, str(directory), console)
    lengths = []
    for shard in manifest.shards:
        dataset = indexed_dataset().IndexedDataset(str(directory / shard.name))
        # A copy: the lengths are a view of a file that is unmapped along with the data set.
        lengths.append(np.array(dataset.sequence_lengths))
    console.print("\nlength of documents, in tokens")
    for line in histogram(np.concatenate(lengths)):
        console.print(line)
    # One from the middle of each of the first shards: these differ more than neighbors do.
    for shard, sizes in list(zip(manifest.shards, lengths, strict=True))[:_SAMPLES]:
        dataset = indexed_dataset().IndexedDataset(str(directory / shard.name))
        index = shard.documents // 2
        size = int(sizes[index])
        shown = min(_SAMPLE_TOKENS, size)
        console.rule(f"{shard.name}, document {index}: {shown} of {size:,} tokens")
        console.print(tokenizer.decode(dataset.get(index, length=shown)))


def histogram(lengths: np.ndarray) -> list[str]:
    """Return the lines of a histogram of ``lengths`` [documents], binned by powers of two."""
    classes = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(classes)
    first = int(np.flatnonzero(counts)[0]) if len(lengths) else 0
    lines = []
    for power in range(first, len(counts)):
        bar = "█" * round(_BAR * counts[power] / counts.max())
        lines.append(f"{2**power:>11,} - {2 ** (power + 1) - 1:<11,} {counts[power]:>10,} {bar}")
    return lines
