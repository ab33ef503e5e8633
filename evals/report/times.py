"""The wall time of each arm of a report, by what it was spent on, as bars of the page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from evals.report.figures import color_of
from evals.report.groups import Group

# By kind of time, what it is in words and its color: what trained stands out.
_KINDS = {
    "train": ("training", "#1f77b4"),
    "start": ("starting", "#98df8a"),
    "data": ("waiting for data", "#ff7f0e"),
    "wait": ("waiting for other processes", "#d62728"),
    "save": ("checkpoints", "#9467bd"),
    "evaluate": ("evaluation", "#bcbd22"),
    "lost": ("steps undone", "#8c564b"),
    "other": ("other", "#7f7f7f"),
}


def times_by_arm(groups: Sequence[Group]) -> dict[str, Any] | None:
    """Return a bar for each arm, as long as its time, and the kinds of time that occur.

    Runs that did not note what they spent it on have bars of one part. None without any time.
    """
    spent = [_mean_of_seeds(group) for group in groups]
    longest = max((sum(parts.values()) for parts in spent), default=0.0)
    if not longest:
        return None
    arms = []
    for index, (group, parts) in enumerate(zip(groups, spent, strict=True)):
        total = sum(parts.values())
        text = _duration(total)
        if "train" in parts and total:
            text += f", goodput {100 * parts['train'] / total:.0f} %"
        color = color_of(index)[0]  # of time that is not told apart
        bar = []
        for kind, seconds in parts.items():
            name, own = _KINDS.get(kind, ("all of it", color))
            title = f"{name}: {_duration(seconds)}"
            bar.append({"width": f"{100 * seconds / longest:.3f}", "color": own, "title": title})
        arms.append({"label": group.label, "text": text, "parts": bar})
    found = [kind for kind in _KINDS if any(parts.get(kind) for parts in spent)]
    return {
        "arms": arms,
        "kinds": [{"name": _KINDS[kind][0], "color": _KINDS[kind][1]} for kind in found],
    }


def _mean_of_seeds(group: Group) -> dict[str, float]:
    """Return the seconds by kind; by "" alone where some seed does not say."""
    if not all(run.spent for run in group.runs):
        return {"": float(np.mean([run.seconds[-1] for run in group.runs]))}
    return {
        kind: float(np.mean([run.spent.get(kind, 0.0) for run in group.runs])) for kind in _KINDS
    }


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:,.1f} s"
    return f"{seconds / 60:,.1f} min" if seconds < 7200 else f"{seconds / 3600:,.2f} h"
