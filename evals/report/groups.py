"""Group the runs of a report by their settings, and name the groups."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from evals.report.runs import Run

MOST_NAMED = 3  # settings in a name: of more, those that tell the groups apart


@dataclass
class Group:
    """Runs that differ only in their seed.

    ``label`` names it among the groups. ``differing`` are the settings in the label, as a grid
    names their values if it does; ``others`` those in which groups differ besides, and what a
    grid's names stand for.
    """

    label: str
    differing: dict[str, Any]
    runs: list[Run]
    others: dict[str, Any] = field(default_factory=dict)

    def mean(self, values: Sequence[float | None]) -> tuple[float, float | None] | None:
        """Return the mean, and the standard deviation over several seeds.

        Returns None where a run has no value.
        """
        known = [v for v in values if v is not None]
        if not known or len(known) < len(values):
            return None
        return float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None

    def mean_of(self, value: Callable[[Run], float | None]) -> tuple[float, float | None] | None:
        """Return the same of what ``value`` returns for each run."""
        return self.mean([value(run) for run in self.runs])


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of their final loss."""
    keys = sorted({k for run in runs for k in run.settings})
    # A setting of a mixer or section that a run lacks is no difference beside that.
    differing = [
        k for k in keys if len({_text(r.resolved[k]) for r in runs if k in r.resolved}) > 1
    ]
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        values = _text([run.resolved.get(k) for k in differing])
        by_settings.setdefault(values, []).append(run)
    members = list(by_settings.values())
    axes, covered = _axes(members, differing)
    rest = [k for k in differing if k not in covered]
    named = [] if axes else _telling(members, rest)
    behind = [k for k in differing if k in covered and not _says_all(members, axes, k)]
    short = _short_names([*axes, *differing])
    groups = []
    for own in members:
        shown: dict[str, Any] = {short[a]: own[0].labels.get(a) for a in axes}
        shown |= {short[k]: own[0].settings.get(k) for k in named}
        words = [f"{name}={_value(value)}" for name, value in shown.items()]
        if axes:
            words = [_word(name, label) for name, label in shown.items() if label is not None]
        below = [k for k in differing if k in behind or (k in rest and k not in named)]
        others = {short[k]: own[0].settings.get(k) for k in below}
        label = (" / " if axes else ", ").join(words)
        groups.append(Group(label or _names(own), shown, own, others))
    _tell_apart(groups)
    return sorted(groups, key=lambda g: float(np.mean([r.final for r in g.runs])))


def shared_settings(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the settings that are the same in all runs."""
    first = runs[0]
    return {
        name: value
        for name, value in sorted(first.settings.items())
        if all(
            name in run.resolved and _text(run.resolved[name]) == _text(first.resolved[name])
            for run in runs
        )
    }


def _names(runs: Sequence[Run]) -> str:
    """Return a name for the only group."""
    more = len(runs) - 1
    return runs[0].name + (f" and {more} more" if more else "")


def _axes(members: Sequence[Sequence[Run]], differing: Sequence[str]) -> tuple[list[str], set[str]]:
    """Return the settings whose labels name the groups, and all settings that these stand for.

    Where a run is of no grid, or a label stands for several values, settings name the groups.
    """
    runs = [run for own in members for run in own]
    if len(members) < 2 or not all(run.labels for run in runs):
        return [], set()
    kept, covered = list[str](), set[str]()
    places: list[tuple[str | None, ...]] = [()] * len(members)
    for axis in dict.fromkeys(name for run in runs for name in run.labels):
        below = [k for k in differing if k == axis or k.startswith(f"{axis}.")]
        values: dict[str | None, set[str]] = {}
        for run in runs:
            resolved = _text([run.resolved.get(k) for k in below])
            values.setdefault(run.labels.get(axis), set()).add(resolved)
        told = [v for label, v in values.items() if label is not None]
        one_each = all(len({run.labels.get(axis) for run in own}) == 1 for own in members)
        if len(values) < 2 or not below or not one_each or any(len(v) > 1 for v in told):
            continue
        split = [(*at, own[0].labels.get(axis)) for at, own in zip(places, members, strict=True)]
        if len(set(split)) > len(set(places)):  # others follow from these, and are shown below
            places = split
            covered.update(below)
            kept.append(axis)
    return kept, covered


def _says_all(members: Sequence[Sequence[Run]], axes: Sequence[str], name: str) -> bool:
    """Return whether the labels of an axis are the values of this setting, as they are written."""
    return name in axes and all(
        run.labels.get(name) is None or _alike(run.labels[name], run.settings.get(name))
        for own in members
        for run in own
    )


def _alike(label: str, value: Any) -> bool:
    try:
        return float(label) == float(value)
    except (TypeError, ValueError):
        return label.lower() == str(value).lower()


def _telling(members: Sequence[Sequence[Run]], differing: Sequence[str]) -> list[str]:
    """Return a few settings by which all groups can be told apart, the pattern first."""
    if len(differing) <= MOST_NAMED:
        return list(differing)

    def parts(names: Sequence[str]) -> int:
        return len({_text([own[0].resolved.get(k) for k in names]) for own in members})

    chosen: list[str] = []
    while parts(chosen) < len(members):
        left = [k for k in differing if k not in chosen]
        chosen.append(max(left, key=lambda k: (parts([*chosen, k]), k == "model.pattern")))
    return [k for k in differing if k in chosen]


def _tell_apart(groups: Sequence[Group]) -> None:
    """Add to labels that several groups have the other settings in which these differ."""
    labels = [group.label for group in groups]
    for label in {label for label in labels if labels.count(label) > 1}:
        alike = [group for group in groups if group.label == label]
        names = [k for k in alike[0].others if len({_text(g.others[k]) for g in alike}) > 1]
        for group in alike:
            added = [f"{name}={_value(group.others[name])}" for name in names]
            group.label = ", ".join([group.label, *added])


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Shorten each dotted name to as few of its last parts as make it unique."""
    names = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[-count:])
            if len({k for k in keys if k == name or k.endswith("." + name)}) == 1:
                break
        names[key] = name
    return names


def _word(name: str, label: str) -> str:
    """Return a grid's label: a number, or yes and no, says nothing without its setting."""
    try:
        float(label)
    except ValueError:
        return f"{name}={label}" if label in ("true", "false", "none", "null", "None") else label
    return f"{name}={label}"


def _value(value: Any) -> str:
    if isinstance(value, float):  # two values never look alike
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    return "-" if value is None else str(value)


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
