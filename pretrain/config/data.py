"""The data of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pretrain.common.config_loader import Config, setting


@dataclass
class DataSource(Config):
    """One prepared directory of a blend."""

    path: str
    """The directory, as ``python -m data_prep`` wrote it."""
    weight: float = setting(1.0, above=0)
    """Its share of the samples, relative to the other weights."""
    weights: dict[str, float] = setting(factory=dict, minimum=0)
    """Weights of its sources by name, in place of those in its manifest; 0 leaves a source out."""


@dataclass
class DataConfig(Config):
    """The training data: exactly one of ``path`` and ``blend`` is set."""

    path: str | None = None
    """A directory that ``python -m data_prep`` wrote; its sources are blended by the weights in its
    manifest."""
    weights: dict[str, float] = setting(factory=dict, minimum=0)
    """Weights of the sources of ``path`` by name, in place of those in its manifest; 0 leaves a
    source out."""
    blend: list[DataSource] = field(default_factory=list)
    """Several such directories, with weights of their own; one that is named twice counts once,
    with both weights."""
    packing: Literal["concatenate", "best_fit"] = setting("concatenate")
    """How documents fill sequences: ``concatenate`` cuts the stream of all of them every
    ``train.seq_len`` tokens; ``best_fit`` puts each into the fullest sequence that has room for it
    and cuts only those that are longer (arXiv 2404.10830), so that ends of sequences may be
    empty."""
    window: int | None = setting(None, minimum=2)
    """Tokens of the windows of text whose order is drawn, a multiple of every ``seq_len``; null:
    the longest ``seq_len`` of all phases. Shorter sequences are the pieces of a window, in their
    order."""
    verify: Literal["size", "sha256"] = setting("size")
    """What is checked of every file before training: its size, or its hash, for which all of the
    data is read."""

    @property
    def directories(self) -> list[DataSource]:
        """Return every directory with its weights."""
        if self.path is not None:
            return [DataSource(self.path, 1.0, self.weights)]
        return self.blend
