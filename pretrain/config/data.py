"""The data of a run."""

from __future__ import annotations

from dataclasses import dataclass, field

from pretrain.common.config_loader import setting


@dataclass
class DataSource:
    """One prepared directory of a blend; weight is its share of the samples."""

    path: str
    weight: float = setting(1.0, above=0)


@dataclass
class DataConfig:
    """path: a directory that data_prep made, whose sources are blended by the weights in its
    manifest; or blend: several such directories with weights of their own."""

    path: str | None = None
    blend: list[DataSource] = field(default_factory=list)
