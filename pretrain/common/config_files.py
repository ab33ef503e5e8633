"""Read files of settings, with the files they extend and the overrides, without a schema."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.common.errors import ConfigError, nearest, short
from pretrain.common.merging import merged
from pretrain.common.shipped_configs import find_config
from pretrain.common.yaml_text import parse_value, read_file


def read_values(path: str | Path) -> dict[str, Any]:
    """Return what a file and those that it extends say, without a schema."""
    return _read(find_config(path), ())


def load_values(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    changes: Mapping[str, Any] | None = None,
    written: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return what a file, its ``extends``, ``changes`` and overrides say, without a schema.

    ``written``: what :func:`read_values` returned, where the file has been read already.
    """
    config = read_values(path) if written is None else copy.deepcopy(dict(written))
    # Sections before the settings inside them.
    for key, value in sorted((changes or {}).items(), key=lambda item: item[0].count(".")):
        try:
            _assign(config, key, copy.deepcopy(value))
        except ValueError as error:
            raise ConfigError(f"{path}: setting '{key}': {error}") from None
    _override(config, overrides)
    return config


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    resolved = path.resolve()
    if resolved in seen:
        raise ConfigError(f"{path}: extends itself, through {' -> '.join(map(str, seen))}")
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))
        raise ConfigError(
            f"{path} is a folder, expected a YAML file"
            + (f" such as {path / inside[0]}" if inside else "")
        )
    if not path.is_file():
        hint = nearest(path.name, [p.name for p in path.parent.glob("*.yaml") if p.is_file()])
        raise ConfigError(f"no config file at {path}{hint}")
    try:
        values = read_file(path)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict | None):
        raise ConfigError(
            f"{path}: expected a mapping of settings at the top, found "
            + ("a list" if isinstance(values, list) else f"the value {short(values)}")
        )
    values = values or {}
    extends = values.pop("extends", None) or []
    bases = [extends] if isinstance(extends, str) else extends
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(
            f"{path}: extends is {short(extends)}, expected a file or a list of files"
        )
    found: dict[str, Any] = {}
    files = [find_config(base, beside=path) for base in bases]
    for part in (*(_read(file, (*seen, resolved)) for file in files), values):
        if "grid" in part:  # replaced, not merged: axes make sense together
            found.pop("grid", None)
        found = merged(found, part)
    return found


def _override(config: dict[str, Any], overrides: Sequence[str]) -> None:
    for item in overrides:
        key, separator, text = item.lstrip("-").partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}': expected key=value, such as seed=1")
        try:
            _assign(config, key, parse_value(text), merge=True)
        except ValueError as error:
            raise ConfigError(f"override '{short(item, str)}': {error}") from None


def _assign(config: dict[str, Any], key: str, value: Any, *, merge: bool = False) -> None:
    """Set the value at a dotted name, such as ``sources.0.weight``, in place.

    ``merge``: a mapping keeps the settings that ``value`` does not name. Raises ValueError where
    there is no such place.
    """
    holder: Any = config
    names = re.sub(r"\[(\d+)\]", r".\1", key).split(".")
    for depth, name in enumerate(names):
        place: Any = name
        if isinstance(holder, list):
            where = ".".join(names[:depth])
            if not (name.isdecimal() and int(name) < len(holder)):
                last = f"{where}.0 to {where}.{len(holder) - 1}" if holder else "a whole list"
                raise ValueError(
                    f"{where} is a list of {len(holder)}, expected {last}, found {where}.{name}"
                )
            place = int(name)
        elif not isinstance(holder, dict):
            raise ValueError(f"{'.'.join(names[:depth])} is {short(holder)}, which has no settings")
        elif holder.get(name) is None and depth < len(names) - 1:
            holder[name] = {}
        if depth < len(names) - 1:
            holder = holder[place]
        else:
            before = holder.get(name) if isinstance(holder, dict) else holder[place]
            holder[place] = merged(before, value) if merge else value
