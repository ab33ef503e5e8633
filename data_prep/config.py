"""Every setting of ``python -m data_prep``."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pretrain.common.config_loader import ConfigError, load_config, setting

KINDS = ("stdlib", "files", "huggingface")


@dataclass
class SourceConfig:
    """Where text comes from. Each source keeps its own shards; weights blend them at load time."""

    name: str  # also in the shards' file names
    kind: str = setting(choices=KINDS)
    weight: float = setting(1.0, above=0)
    text_field: str = "text"  # of jsonl, parquet and Hugging Face rows
    max_documents: int | None = setting(None, minimum=1)
    # files
    paths: list[str] = dataclasses.field(
        default_factory=list
    )  # files, folders (recursive), globs with ** if wanted
    # huggingface
    dataset: str | None = None  # a hub name, a builder (json, parquet, text), or a folder
    config: str | None = None
    data_files: list[str] = dataclasses.field(default_factory=list)
    split: str = "train"
    revision: str | None = None
    streaming: bool = False


@dataclass
class TokenizerConfig:
    """A tokenizer to train, or with ``path`` an existing one."""

    kind: str = setting("bpe", choices=("bpe", "unigram"))
    vocab_size: int = setting(32_000, minimum=261, maximum=4_000_000)
    sample_bytes: int = setting(100_000_000, minimum=1_000, maximum=10_000_000_000)
    path: str | None = None  # a SentencePiece .model or a Hugging Face tokenizer.json


@dataclass
class DataPrepConfig:
    """One data set: sources of text, a tokenizer, and how the shards are cut."""

    output: str
    sources: list[SourceConfig]
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    validation_fraction: float = setting(0.01, minimum=0, below=1)  # of documents, by their hash
    shard_bytes: int = setting(256_000_000, minimum=1_000)  # of text; a shard ends after it
    processes: int | None = setting(None, minimum=1, maximum=1024)  # null: all cores
    seed: int = setting(0, minimum=0)  # of the tokenizer's training sample


_ONLY_FOR = {
    "files": ("paths",),
    "huggingface": ("dataset", "config", "data_files", "split", "revision", "streaming"),
}


def load_data_config(path: str | Path, overrides: Sequence[str] = ()) -> DataPrepConfig:
    """Read and check a data config; :class:`ConfigError` says what is wrong and where."""
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
            raise ConfigError(f"{where}.name is '{source.name}', which another source has too")
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
