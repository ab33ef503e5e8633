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


@dataclass
class DataConfig(Config):
    """The training data: exactly one of ``path`` and ``blend`` is set."""

    path: str | None = None
    """A directory that ``python -m data_prep`` wrote; its sources are blended by the weights in its
    manifest."""
    blend: list[DataSource] = field(default_factory=list)
    """Several such directories, with weights of their own; one that is named twice counts once,
    with both weights."""
    verify: Literal["size", "sha256"] = setting("size")
    """What is checked of every file before training: its size, or its hash, for which all of the
    data is read."""

    @property
    def directories(self) -> list[tuple[str, float]]:
        """Return every directory with its weight."""
        if self.path is not None:
            return [(self.path, 1.0)]
        return [(source.path, source.weight) for source in self.blend]
