"""The settings of ``python -m data_prep``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from data_prep.registry import source_class, source_kinds
from pretrain.common.config_loader import (
    Config,
    ConfigError,
    OneOf,
    build_config,
    load_config,
    setting,
)

SourceKind = Annotated[str, OneOf(source_kinds)]


@dataclass
class SourceConfig(Config):
    """A source of text. Each has shards of its own, which weights blend at load time."""

    name: str
    """Name of the source, also in the names of its shards."""
    kind: SourceKind = setting()
    """Python's standard library, files on disk, or a data set for the library ``datasets``."""
    weight: float = setting(1.0, above=0)
    """Share of the samples that training takes from this source, relative to the other weights; a
    run can set others (``data.weights``)."""
    text_field: str = "text"
    """The field that has the text, of jsonl, parquet and Hugging Face rows."""
    max_documents: int | None = setting(None, minimum=1)
    """Documents to read; null: all of them."""
    paths: list[str] = dataclasses.field(default_factory=list)
    """Files, folders (with all that is in them), and globs, in which ``**`` stands for any folders;
    for kind ``files``."""
    dataset: str | None = None
    """A name on the hub, a builder (json, parquet, text), or a folder; for kind ``huggingface``."""
    config: str | None = None
    """The data set's configuration, for kind ``huggingface``; null: its default."""
    data_files: list[str] = dataclasses.field(default_factory=list)
    """The files that a builder reads, for kind ``huggingface``."""
    split: str = "train"
    """The split to read, for kind ``huggingface``."""
    revision: str | None = None
    """Branch, tag or commit of the data set, for kind ``huggingface``; null: the newest."""
    streaming: bool = False
    """Whether rows are read as they arrive, not after a download, for kind ``huggingface``."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of this kind alone, which its module in data_prep/source_kinds declares: for kind
    ``files``, ``separator``; for ``stdlib``, ``files``, globs within it."""


@dataclass
class TokenizerConfig(Config):
    """A tokenizer to train, or with ``path`` an existing one."""

    kind: Literal["bpe", "unigram"] = setting("bpe")
    """The kind of tokenizer that SentencePiece trains: byte-pair encoding or a unigram model."""
    vocab_size: int = setting(32_000, minimum=261, maximum=4_000_000)
    """Ids of the tokenizer, the 256 bytes among them."""
    sample_bytes: int = setting(100_000_000, minimum=1_000, maximum=10_000_000_000)
    """Bytes of text that it is trained on."""
    path: str | None = None
    """An existing tokenizer: a SentencePiece ``.model`` or a Hugging Face ``tokenizer.json``; null:
    train one."""


@dataclass
class DataPrepConfig(Config):
    """The settings of one data set: sources of text, a tokenizer, and how shards are cut."""

    output: str
    """The directory to write."""
    sources: list[SourceConfig]
    """Sources of text, at least one."""
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    """The tokenizer."""
    validation_fraction: float = setting(0.01, minimum=0, below=1)
    """Share of the documents that is held out, chosen by their hash."""
    shard_bytes: int = setting(256_000_000, minimum=1_000)
    """Bytes of text after which a shard ends."""
    processes: int | None = setting(None, minimum=1, maximum=1024)
    """Processes that tokenize; null: one for every core."""
    seed: int = setting(0, minimum=0)
    """Seed of the tokenizer's training sample."""


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> DataPrepConfig:
    """Read and check a data config.

    Raises :class:`ConfigError`, which names the setting.
    """
    config = load_config(DataPrepConfig, path, overrides)
    if not config.sources:
        raise ConfigError(f"{path}: sources is empty, expected at least one source of text")
    names = [source.name for source in config.sources]
    for index, source in enumerate(config.sources):
        where = f"{path}: sources[{index}]"
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", source.name):
            raise ConfigError(
                f"{where}.name is '{source.name}', expected letters, digits, '_', '-' or '.', "
                "because it becomes part of file names"
            )
        if names.count(source.name) > 1:
            raise ConfigError(f"{where}.name is '{source.name}', the name of another source too")
        _check_kind(source, where)
    return config


def _check_kind(source: SourceConfig, where: str) -> None:
    """Check the settings that only some kinds of sources have, by what the kinds declare."""
    own, options = source_class(source.kind).settings, source_class(source.kind).options_class
    for name, expected in own.items():
        if expected is not None and not getattr(source, name):
            raise ConfigError(f"{where}.{name} must be set: {expected}")
    default = SourceConfig(source.name, source.kind)
    owners: dict[str, list[str]] = {}
    for kind in source_kinds():
        for name in source_class(kind).settings:
            owners.setdefault(name, []).append(kind)
    for name, kinds in owners.items():
        if name not in own and getattr(source, name) != getattr(default, name):
            only = " and ".join(kinds)
            raise ConfigError(f"{where}.{name} is only for kind {only}, not {source.kind}")
    if options is not None:
        build_config(options, source.options, f"{where}.options")
    elif source.options:
        raise ConfigError(f"{where}.options is {source.options}, but {source.kind} has none")
