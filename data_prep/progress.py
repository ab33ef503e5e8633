"""``.partial/progress.json``: the state of an unfinished data set."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.workers import TokenizedBatch
from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.data.manifest import Counts, ShardEntry

NAME = "progress.json"


@dataclass(frozen=True)
class Position:
    """A position in the sources: all before it has been read."""

    source: int = 0
    file: int = 0
    documents: int = 0  # read of the file
    total: int = 0  # read of the source


@dataclass
class Progress:
    """The complete shards, and the counts of the text in them."""

    settings: dict[str, Any]
    fingerprints: dict[str, str]  # by source
    tokenizer_sha256: str | None = None
    position: Position = field(default_factory=Position)
    shards: list[ShardEntry] = field(default_factory=list)
    skipped: dict[str, dict[str, int]] = field(default_factory=dict)  # by source
    bigrams: str = ""  # [256 + 65536] int64, compressed: single bytes, then pairs
    path: str = ""

    def __post_init__(self) -> None:
        self._counts = (
            np.frombuffer(zlib.decompress(base64.b64decode(self.bigrams)), dtype=np.int64).copy()
            if self.bigrams
            else np.zeros(256 + 65_536, dtype=np.int64)
        )

    @classmethod
    def load(cls, path: Path) -> Progress | None:
        """Read the progress saved at ``path``; return None when there is none.

        Raises :class:`UserError` for a damaged file.
        """
        try:
            progress = build_config(cls, json.loads(path.read_bytes()), str(path))
        except FileNotFoundError:
            return None
        except (ValueError, ConfigError) as error:
            raise UserError(f"{path}: damaged ({error}); start over with --overwrite") from None
        progress.path = str(path)
        return progress

    def save(self) -> None:
        """Write the file atomically."""
        packed = zlib.compress(self._counts.tobytes())
        self.bigrams = base64.b64encode(packed).decode()
        write_json(Path(self.path), dataclasses.asdict(self))

    def count(self, source: str, batch: TokenizedBatch) -> None:
        """Add a batch's skipped documents and its counts of bytes."""
        skipped = self.skipped.setdefault(source, dict.fromkeys(batch.skipped, 0))
        for why, number in batch.skipped.items():
            skipped[why] += number
        self._counts[:256] += batch.unigrams
        self._counts[256:] += batch.bigrams

    def add(self, shards: list[ShardEntry], position: Position) -> None:
        """List complete shards, which hold everything up to ``position``, and save."""
        self.shards.extend(shards)
        self.position = position
        self.save()

    def next_index(self, source: str) -> int:
        """Return the index of the next shard of ``source``."""
        indices = (int(s.name.rpartition("-")[2]) for s in self.shards if s.source == source)
        return max(indices, default=-1) + 1

    def counts(self, source: str, split: str) -> Counts:
        """Return the counts of all complete shards of a source's split."""
        total = Counts()
        for shard in self.shards:
            if (shard.source, shard.split) == (source, split):
                total.add(Counts(shard.documents, shard.tokens, shard.bytes))
        return total

    def entropies(self) -> tuple[float, float]:
        """Return the entropies of a byte, and of a byte given the previous one, in bits."""
        pairs = self._counts[256:].reshape(256, 256)
        return _bits(self._counts[:256]), _bits(pairs.ravel()) - _bits(pairs.sum(axis=1))


def _bits(counts: npt.NDArray[np.int64]) -> float:
    """Return the entropy in bits of the distribution that ``counts`` describe."""
    total = counts.sum()
    if total == 0:
        return 0.0
    shares = counts[counts > 0] / total
    return float(-(shares * np.log2(shares)).sum())


def shard_files(output: Path) -> list[Path]:
    """Return the files in ``output`` that are named like shards, sorted."""
    if not output.is_dir():
        return []
    pattern = re.compile(r"(train|valid)-.+-\d{5,}\.(bin|idx)")
    return sorted(path for path in output.iterdir() if pattern.fullmatch(path.name))
