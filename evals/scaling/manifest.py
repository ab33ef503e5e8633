"""A file that lists curves and what their logs do not say, such as ``curves.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from evals.scaling.reading import Reading
from pretrain.common.config_loader import Config, load_config, setting
from pretrain.common.errors import UserError
from pretrain.run_arguments import expand_paths

SUFFIXES = (".yaml", ".yml")


@dataclass
class CurveEntry(Config):
    """One log; paths are relative to the manifest."""

    file: str = ""
    """The log, or a run's directory; of several that a pattern names each is a curve."""
    name: str | None = None
    """The name of the curve from then on, instead of its file's."""
    run: str | None = None
    """The run's name in an export of several."""
    parameters: float | None = setting(None, above=0)
    tokens_per_step: float | None = setting(None, above=0)
    schedule: str | None = None
    warmup_steps: int | None = setting(None, minimum=0)
    from_step: int | None = setting(None, minimum=0)
    branch_of: str | None = None
    """The name of the curve that it branches off, or NAME@STEP."""
    unit: Literal["nats", "bits"] | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class Manifest(Config):
    """Curves to read."""

    curves: list[CurveEntry] = field(default_factory=list)


@dataclass
class Source:
    """A file or folder to read, with options of its own."""

    path: Path
    reading: Reading
    name: str | None = None
    run: str | None = None


def sources_of(path: Path, reading: Reading) -> list[Source]:
    """Return what a path names: itself, or what a manifest lists; raises UserError for bad ones."""
    if path.is_dir() or path.suffix not in SUFFIXES:
        return [Source(path, reading)]
    found = load_config(Manifest, path)
    if not found.curves:
        raise UserError(f"{path}: curves is empty, expected a list of logs, each with its file")
    result = list[Source]()
    for number, entry in enumerate(found.curves):
        where = f"{path}: curves[{number}]"
        if not entry.file:
            raise UserError(f"{where}: file is missing, expected a log, relative to {path.name}")
        try:
            paths = expand_paths([path.parent / entry.file])
        except UserError as error:
            raise UserError(f"{where}: file: {error}") from None
        if entry.name is not None and len(paths) > 1:
            raise UserError(
                f"{where}: name is '{entry.name}', but {entry.file} names {len(paths)} files, "
                "expected no name or one file"
            )
        own: dict[str, Any] = {
            "columns": {**(reading.columns or {}), **entry.columns},
            **{
                what: getattr(entry, what)
                for what in (
                    *("parameters", "tokens_per_step", "schedule", "warmup_steps"),
                    *("from_step", "branch_of", "unit"),
                )
            },
        }
        result += [Source(p, reading.with_changes(own), entry.name, entry.run) for p in paths]
    return result
