"""``manifest.json``, the contents of a finished data set, written last to vouch for all of it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.common.errors import UserError
from pretrain.common.files import file_sha256, write_json

FORMAT = 1
NAME = "manifest.json"


@dataclass
class TokenizerEntry:
    """The tokenizer's file, next to the manifest."""

    file: str
    kind: str
    vocab_size: int
    eod_id: int
    sha256: str
    lossless: bool


@dataclass
class ByteEntropy:
    """Bits per byte of all text: of single bytes, and of a byte given the one before it."""

    unigram: float
    bigram: float


@dataclass
class Counts:
    """Counts of documents; the tokens include one end-of-document token each."""

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def add(self, other: Counts) -> None:
        """Add the counts of ``other``, in place."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes


@dataclass
class SourceEntry:
    """One source of the config, as found."""

    name: str
    kind: str
    weight: float
    fingerprint: str
    documents: int
    bytes: int
    skipped: dict[str, int]
    splits: dict[str, Counts]


@dataclass
class ShardEntry:
    """A pair ``NAME.bin`` and ``NAME.idx``."""

    name: str
    source: str
    split: str
    documents: int
    tokens: int
    bytes: int  # of the text
    sha256: dict[str, str]  # bin, idx
    size: dict[str, int]  # bin, idx: bytes on disk


@dataclass
class Manifest:
    """Everything about a finished data set."""

    format: int
    created: str
    settings: dict[str, Any]
    settings_sha256: str
    content_sha256: str
    tokenizer: TokenizerEntry
    dtype: str
    byte_entropy: ByteEntropy
    sources: list[SourceEntry]
    shards: list[ShardEntry]
    warnings: list[str] = field(default_factory=list)

    def content_of(self, source: str) -> tuple[str, ...]:
        """Return the name of a source with the hashes of its shards, of whichever other sources."""
        shards = [shard for shard in self.shards if shard.source == source]
        return source, *(shard.sha256[part] for shard in shards for part in ("bin", "idx"))

    @classmethod
    def load(cls, directory: str | Path) -> Manifest:
        """Read the manifest of ``directory``. Raises UserError when it is missing or damaged."""
        path = Path(directory) / NAME
        try:
            values = json.loads(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{directory} holds no {NAME}: run python -m data_prep CONFIG first (the same "
                "command again if it was interrupted)"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:
            raise UserError(f"{path}: damaged, not valid JSON ({error})") from None
        found = values.get("format") if isinstance(values, dict) else None
        if found != FORMAT:
            raise UserError(f"{path}: format is {found!r}, this version reads format {FORMAT}")
        try:
            return build_config(cls, values, str(path))
        except ConfigError as error:
            raise UserError(f"{error} (a damaged or foreign manifest)") from None

    def save(self, directory: Path) -> None:
        """Write the manifest atomically."""
        write_json(directory / NAME, dataclasses.asdict(self))

    def counts(self, split: str) -> Counts:
        """Return the counts of all sources together."""
        total = Counts()
        for source in self.sources:
            total.add(source.splits[split])
        return total

    @property
    def hashes(self) -> dict[str, str]:
        """Return the sha256 of every file by its name: the tokenizer's and the shards'."""
        found = {self.tokenizer.file: self.tokenizer.sha256}
        for shard in self.shards:
            found |= {f"{shard.name}.{suffix}": value for suffix, value in shard.sha256.items()}
        return found

    def damaged_files(
        self,
        directory: str | Path,
        part: int = 0,
        parts: int = 1,
        alive: Callable[[], None] = lambda: None,
    ) -> list[str]:
        """Return a sentence for every file that is missing or whose hash is another one.

        Each of ``parts`` processes hashes every ``parts``-th file; ``alive`` is called after each.
        """
        damaged = []
        for name, sha256 in list(self.hashes.items())[part::parts]:
            path = Path(directory) / name
            if not path.is_file():
                damaged.append(f"{path} is missing")
            elif file_sha256(path) != sha256:
                damaged.append(f"{path} is damaged (its hash differs from the manifest's)")
            alive()
        return damaged

    def verify_sizes(self, directory: str | Path) -> None:
        """Check the sizes of all files. Raises UserError naming the first that is wrong."""
        for shard in self.shards:
            for suffix, size in shard.size.items():
                path = Path(directory) / f"{shard.name}.{suffix}"
                found = path.stat().st_size if path.is_file() else None
                if found != size:
                    words = "is missing" if found is None else f"has {found} bytes"
                    raise UserError(f"shard {path} {words}, expected {size} bytes")


def content_hash(shards: list[ShardEntry], tokenizer_sha256: str) -> str:
    """Return one hash for all tokens of a data set and what they mean."""
    digest = hashlib.sha256(tokenizer_sha256.encode())
    for shard in shards:
        digest.update(f"{shard.name} {shard.sha256['bin']} {shard.sha256['idx']}\n".encode())
    return digest.hexdigest()


def settings_hash(settings: dict[str, Any]) -> str:
    """Return one hash for all settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def check_outside_data(directory: Path, where: str) -> None:
    """Raise ConfigError, beginning with ``where``, for a run directory inside a data set."""
    resolved = directory.resolve()
    for folder in (resolved, *resolved.parents):
        if _is_data_set(folder):
            raise ConfigError(
                f"{where}: the run directory {directory} is in the data set {folder}, whose files "
                "belong to python -m data_prep; expected another directory, such as runs/NAME"
            )


def _is_data_set(folder: Path) -> bool:
    try:
        values = json.loads((folder / NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and {"tokenizer", "shards"} <= values.keys()
