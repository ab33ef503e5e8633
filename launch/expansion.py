"""Expand a config with a ``grid`` section into the runs that it stands for.

.. code-block:: yaml

    name: ratios
    extends: ../runs/demo.yaml
    grid:
      model.pattern: ["8*gdn", "2*(3*gdn attn)"]     # every combination of the axes
      seed: [0, 1, 2]
      zip:                                           # axes that advance together
        - {optimizer.lr: [1e-3, 3e-4], schedule.warmup_steps: [10, 40]}
      exclude: [{model.pattern: "8*gdn", seed: 2}]   # members with all of these values
      include: [{model.pattern: "8*attn"}]           # additional members with these values
      match: parameters                              # see launch/matching.py

Values of an axis may have labels for the members' names, ``{pure: "8*gdn", hybrid: ...}``, which
``exclude`` and ``include`` may use too. A grid replaces the one of a file that it extends.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.grid import Grid, Member
from launch.matching import match_members
from launch.throughput import read_throughput
from pretrain.common.config_files import load_values, read_values
from pretrain.common.config_loader import ConfigError, load_config, nearest
from pretrain.config import RunConfig, check_run_config
from pretrain.model.spec import check_model

_LONGEST_NAME = 80
_RESERVED = ("zip", "exclude", "include", "match")
_OF_THE_GRID = ("name", "directory", "grid", "extends")  # settings that its members cannot have
_MOST_MEMBERS = 1000  # as Slurm's default MaxArraySize allows


@dataclass(frozen=True)
class Choice:
    """One value of an axis, and its label in members' names."""

    value: Any
    label: str


def load_grid(path: str | Path, overrides: Sequence[str] = (), *, measuring: bool = False) -> Grid:
    """Expand and check a grid; a config without a grid section gives a grid of one member.

    ``measuring`` loads a grid with ``match: time`` before its members' speeds are known. Raises
    ConfigError, naming the member, where any could not run.
    """
    _check_grid_overrides(overrides, str(path))
    written = read_values(path)
    values = load_values(path, overrides, written=written)
    section = values.pop("grid", None)
    name = str(values.get("name"))
    directory = Path(values.get("directory") or Path("runs") / name)
    points = _points(section, str(path)) if section is not None else [{}]
    _check_overrides(overrides, points, str(path))
    differing = [
        key
        for key in sorted({k for p in points for k in p})
        if len({_key(p.get(key)) for p in points}) > 1
    ]
    members: list[Member] = []
    for point in points:
        member = _name(point, differing)
        changes = {key: choice.value for key, choice in point.items()}
        where = f"{path}, member {member}" if member else str(path)
        config = load_config(
            RunConfig,
            path,
            overrides,
            changes=changes,
            written=written,
            ignore=("grid",),
            where=where,
        )
        if member:
            config.name, config.directory = f"{name}-{member}", str(directory / member)
        check_model(config.model, where)
        labels = {key: choice.label for key, choice in point.items() if key in differing}
        members.append(Member(member, changes, config, labels))
    _check_names(members, str(path))
    how = (section or {}).get("match")
    if how is not None:
        speeds = None
        if how == "time" and not measuring:
            speeds = read_throughput(directory, [m.name for m in members])
        match_members(members, str(how), str(path), speeds)
    for m in members:
        check_run_config(m.config, f"{path}, member {m.name}" if m.name else str(path))
    return Grid(name, Path(path), directory, members, how)


def _points(section: Any, where: str) -> list[dict[str, Choice]]:
    """Return the settings of each member, by dotted name, in the order of the axes."""
    if not isinstance(section, Mapping) or not section:
        raise ConfigError(f"{where}: grid is {section!r}, expected axes, 'setting: [values]'")
    section = {_with_dots(key): values for key, values in section.items()}
    axes = [
        [{key: c} for c in _choices(key, values, where)]
        for key, values in section.items()
        if key not in _RESERVED
    ]
    zips = section.get("zip") or []
    for group in zips if isinstance(zips, list) else [zips]:
        axes.append(_zipped(group, where))
    _check_axes(axes, where)
    included = _conditions(section, "include", where)
    _check_number(axes, len(included), where)
    points = [_merged(parts) for parts in itertools.product(*axes)] if axes else []
    points = _without_excluded(points, _conditions(section, "exclude", where), where)
    labelled = {(key, choice.label): choice for point in points for key, choice in point.items()}
    for extra in included:
        points.append(
            {
                key: labelled.get((key, _text(value)), Choice(value, _text(value)))
                for key, value in extra.items()
            }
        )
    if not points:
        raise ConfigError(
            f"{where}: grid has no members; add axes or include, or exclude fewer (axes of a file "
            "that it extends do not count)"
        )
    for key in {key for point in points for key in point}:
        if key in _OF_THE_GRID:
            raise ConfigError(
                f"{where}: grid has an axis '{key}', which is the grid's and not its members': "
                "their names and directories follow from the settings that differ; name other "
                "settings as axes, and label their values, {label: value}"
            )
    return points


def _check_number(axes: Sequence[Sequence[Any]], included: int, where: str) -> None:
    """Raise ConfigError for more members than anyone starts; nothing is expanded before."""
    lengths = [len(axis) for axis in axes]
    count = (math.prod(lengths) if lengths else 0) + included
    if count > _MOST_MEMBERS:
        raise ConfigError(
            f"{where}: grid has {count:,} members, {' x '.join(map(str, lengths))} by its axes and "
            f"{included} by include, expected at most {_MOST_MEMBERS:,}: list fewer values, let "
            "axes advance together (zip), or cut it into several grids"
        )


def _without_excluded(
    points: Sequence[dict[str, Choice]], excluded: Sequence[Mapping[str, Any]], where: str
) -> list[dict[str, Choice]]:
    """Return the points that no entry of ``exclude`` matches; each must match one at least."""
    axes = sorted({key for point in points for key in point})
    for entry in excluded:
        for key in entry:
            if key not in axes:
                raise ConfigError(
                    f"{where}: grid.exclude has {key}{nearest(key, axes)}, which is no axis of the "
                    f"grid; its axes: {', '.join(axes) or 'none'}"
                )
        if not any(_matches(point, entry) for point in points):
            raise ConfigError(
                f"{where}: grid.exclude has {dict(entry)}, which matches no member; expected "
                "values or labels of the axes that come together: "
                + "; ".join(f"{key}: {_listed(points, key)}" for key in entry)
            )
    return [p for p in points if not any(_matches(p, entry) for entry in excluded)]


def _listed(points: Sequence[dict[str, Choice]], key: str) -> str:
    """Return the labels of an axis, for a message."""
    return ", ".join(dict.fromkeys(point[key].label for point in points if key in point))


def _check_grid_overrides(overrides: Sequence[str], where: str) -> None:
    """Raise ConfigError for an override of an axis whose name has dots: it would mean a section."""
    for item in overrides:
        head, *rest = item.lstrip("-").partition("=")[0].split(".")
        if head == "grid" and len(rest) > 1 and rest[0] != "zip":
            raise ConfigError(
                f"{where}: override '{item}': the axis {'.'.join(rest)} is set in a file alone; "
                f"expected one that extends {where} and has a grid of its own"
            )


def _check_overrides(
    overrides: Sequence[str], points: Sequence[dict[str, Choice]], where: str
) -> None:
    """Raise ConfigError for an override of what an axis sets: members' names would be wrong."""
    choices: dict[str, list[Any]] = {}
    for point in points:
        for key, choice in point.items():
            choices.setdefault(key, []).append(choice.value)
    for item in overrides:
        name = _with_dots(item.lstrip("-").partition("=")[0])
        for axis, values in choices.items():
            inside = name.startswith(f"{axis}.")  # of a section that the axis may set
            path = name.removeprefix(f"{axis}.").split(".")
            if (
                name == axis
                or axis.startswith(f"{name}.")
                or (inside and any(_has(value, path) for value in values))
            ):
                raise ConfigError(
                    f"{where}: override '{item}' replaces what the grid's axis {axis} sets, so the "
                    "members' names would not be true; leave it out, or give a file that extends "
                    f"{where} a grid of its own without this axis"
                )


def _with_dots(name: str) -> str:
    """Return the name of a setting with its indexes as names: ``blend[0].weight`` has two forms."""
    return re.sub(r"\[(\d+)\]", r".\1", name)


def _check_axes(axes: Sequence[Sequence[dict[str, Choice]]], where: str) -> None:
    """Raise ConfigError for two axes that set the same: one's labels would not be true."""
    values = [(key, [c[key].value for c in axis]) for axis in axes for key in axis[0]]
    for (section, given), (name, _) in itertools.permutations(values, 2):
        inside = name.startswith(f"{section}.")  # of a section that the axis may set
        path = name.removeprefix(f"{section}.").split(".")
        if name == section or (inside and any(_has(value, path) for value in given)):
            raise ConfigError(
                f"{where}: grid has the axes {section} and {name}, which set the same; leave out "
                "one of them"
            )


def _has(value: Any, path: Sequence[str]) -> bool:
    """Return whether a section says something about the setting at ``path``."""
    for name in path:
        if not isinstance(value, Mapping):
            return True  # such as null: the override makes a section of it
        if name not in value:
            return False
        value = value[name]
    return True


def _choices(key: str, values: Any, where: str) -> list[Choice]:
    if isinstance(values, Mapping):
        found = [Choice(value, str(label)) for label, value in values.items()]
    elif isinstance(values, Sequence) and not isinstance(values, str):
        found = [Choice(value, _text(value)) for value in values]
    else:
        raise ConfigError(f"{where}: grid.{key} is {values!r}, expected a list of values")
    if not found:
        raise ConfigError(f"{where}: grid.{key} is empty, expected at least one value")
    return found


def _zipped(group: Any, where: str) -> list[dict[str, Choice]]:
    if not isinstance(group, Mapping) or not group:
        raise ConfigError(f"{where}: grid.zip is {group!r}, expected axes of equal length")
    columns = {_with_dots(key): _choices(key, values, where) for key, values in group.items()}
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise ConfigError(f"{where}: the axes of grid.zip have different lengths: {listed}")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _merged(parts: Sequence[dict[str, Choice]]) -> dict[str, Choice]:
    return {key: choice for part in parts for key, choice in part.items()}


def _conditions(section: Mapping[str, Any], name: str, where: str) -> list[Mapping[str, Any]]:
    found = section.get(name) or []
    entries = list(found) if isinstance(found, Sequence) else [found]
    for entry in entries:
        if not isinstance(entry, Mapping) or not entry:
            raise ConfigError(f"{where}: grid.{name} has {entry!r}, expected setting: value pairs")
    return entries


def _matches(point: dict[str, Choice], condition: Mapping[str, Any]) -> bool:
    return all(
        key in point and value in (point[key].value, point[key].label)
        for key, value in condition.items()
    )


def _key(choice: Choice | None) -> str:
    return "" if choice is None else repr(choice.value)


def _name(point: dict[str, Choice], differing: Sequence[str]) -> str:
    """Return a name such as ``lr=0.001,seed=0``, the same for any order of axes and values."""
    short = _short_keys(differing)
    parts = [f"{short[key]}={_plain(point[key].label)}" for key in differing if key in point]
    name = ",".join(parts)
    if len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: _LONGEST_NAME - 9]}-{digest}"


def _short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted name to its last part where that is unique."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return "_".join(f"{k}-{_text(v)}" for k, v in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return "_".join(_text(v) for v in value)
    return str(value)


def _plain(text: str) -> str:
    """Replace what does not fit in a folder's name or an unquoted command line."""
    text = text.replace("*", "x").replace(" ", "_").replace("(", "").replace(")", "")
    return re.sub(r"[^A-Za-z0-9._+-]+", "-", text).strip(".").rstrip("-") or "none"


def _check_names(members: Sequence[Member], where: str) -> None:
    seen: dict[str, Member] = {}
    for member in members:
        if member.name in seen:
            raise ConfigError(
                f"{where}: two members of the grid are named '{member.name}': {member.changes} and "
                f"{seen[member.name].changes}; label their values, {{label: value}}"
            )
        seen[member.name] = member
