"""The settings of ``python -m data_prep``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.common.config_loader import Config, ConfigError, load_config, setting


@dataclass
class SourceConfig(Config):
    """A source of text. Each has shards of its own, which weights blend at load time."""

    name: str
    """Name of the source, also in the names of its shards."""
    kind: Literal["stdlib", "files", "huggingface"] = setting()
    """Python's standard library, files on disk, or a data set for the library ``datasets``."""
    weight: float = setting(1.0, above=0)
    """Share of the samples that training takes from this source, relative to the other weights."""
    text_field: str = "text"
    """The field that has the text, of jsonl, parquet and Hugging Face rows."""
    max_documents: int | None = setting(None, minimum=1)
    """Documents to read; null: all of them."""
    paths: list[str] = dataclasses.field(default_factory=list)
    """Of kind ``files``: files, folders (with all that is in them), and globs, in which ``**``
    stands for any folders."""
    dataset: str | None = None
    """Of kind ``huggingface``: a name on the hub, a builder (json, parquet, text), or a folder."""
    config: str | None = None
    """Of kind ``huggingface``: the data set's configuration; null: its default."""
    data_files: list[str] = dataclasses.field(default_factory=list)
    """Of kind ``huggingface``: the files that a builder reads."""
    split: str = "train"
    """Of kind ``huggingface``: the split to read."""
    revision: str | None = None
    """Of kind ``huggingface``: branch, tag or commit of the data set; null: the newest."""
    streaming: bool = False
    """Of kind ``huggingface``: whether rows are read as they arrive instead of after a download."""


@dataclass
class TokenizerConfig(Config):
    """A tokenizer to train, or with ``path`` an existing one."""

    kind: Literal["bpe", "unigram"] = setting("bpe")
    """What is trained: byte-pair encoding or a unigram model, by SentencePiece."""
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
    """Where text comes from, at least one source."""
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


_ONLY_FOR = {
    "files": ("paths",),
    "huggingface": ("dataset", "config", "data_files", "split", "revision", "streaming"),
}


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
    if source.kind == "files" and not source.paths:
        raise ConfigError(f"{where}.paths must be set: the files, folders or globs to read")
    if source.kind == "huggingface" and not source.dataset:
        raise ConfigError(f"{where}.dataset must be set: a hub name, a builder, or a folder")
    defaults = {item.name: item for item in dataclasses.fields(SourceConfig)}
    for kind, names in _ONLY_FOR.items():
        for name in names:
            item = defaults[name]
            factory = item.default_factory
            default = item.default if factory is dataclasses.MISSING else factory()
            if source.kind != kind and getattr(source, name) != default:
                raise ConfigError(f"{where}.{name} is only for kind {kind}, not {source.kind}")
