"""A grid of runs and its members, as every command of this package handles them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pretrain.config import RunConfig


@dataclass
class Member:
    """One run of a grid.

    ``name`` is made of the settings that differ between members, "" where none does; ``changes``
    are the settings that it adds to those of the file, by dotted name; ``labels`` what the grid
    calls the values of those that differ between members.
    """

    name: str
    changes: dict[str, Any]
    config: RunConfig
    labels: dict[str, str] = field(default_factory=dict)


@dataclass
class Grid:
    """A grid of runs; ``directory`` holds the members' run directories.

    ``match`` is the budget that all members share, one of :data:`launch.matching.MATCHES`.
    """

    name: str
    path: Path
    directory: Path
    members: list[Member]
    match: str | None = None
