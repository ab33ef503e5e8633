"""The scaling fits of a report: one per architecture, with intervals."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling import Curve, Reading, bootstrap, curve_law, fit, read_curves
from evals.scaling.choosing import by_identifiability
from pretrain.common.errors import UserError
from pretrain.common.screen import readable

SAMPLES = 40  # of the bootstrap
# Settings of a model that differ between the sizes of one architecture.
_SIZES = re.compile(r"(_size|_heads|_dim|vocab|init_std)$")
_NONE = (
    "No law is fitted: these runs are neither three sizes of one architecture nor one size with "
    "several schedules. python -m evals scaling fit fits a law to the runs that it is given."
)
_OTHERS = ("data.path", "data.blend", "optimizer.kind")


def architecture(curve: Curve) -> str:
    """Return what a curve's model has in common with other sizes of it, and its data and optimizer.

    The number of repetitions that a pattern begins with is a size; runs of other programs have no
    settings, and count as one architecture.
    """
    kept = {
        name: value
        for name, value in curve.labels.items()
        if (name.startswith("model.") and not _SIZES.search(name)) or name in _OTHERS
    }
    if "model.pattern" in kept:
        kept["model.pattern"] = re.sub(r"^\d+\*", "", str(kept["model.pattern"]))
    return json.dumps(kept, sort_keys=True, default=str)


def scaling_sets(curves: Sequence[Curve]) -> list[tuple[str, list[Curve], bool]]:
    """Return (heading, curves, whether the law includes N) for each law that means something.

    Laws never span architectures. Of each, one law with N is fitted to at least three sizes, and
    otherwise one to each size that was trained with several schedules. Models of one width and one
    pattern that differ in parts, such as the size of a state, are no sizes of one architecture, and
    one schedule at several learning rates is not several schedules.
    """
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(architecture(curve), []).append(curve)
    sets: list[tuple[str, list[Curve], bool]] = []
    for number, members in enumerate(groups.values(), 1):
        pattern = members[0].labels.get("model.pattern", f"architecture {number}")
        of = f"of {pattern}, " if len(groups) > 1 else ""
        sizes = sorted({c.parameters for c in members if c.parameters is not None})
        if min(len(sizes), len({_shape(c) for c in members})) >= 3:
            sets.append((f"{of or 'of '}all sizes", members, True))
            continue
        for n in sizes:
            chosen = [c for c in members if c.parameters == n]
            schedules: dict[float, set[str]] = {}
            for c in chosen:
                schedules.setdefault(c.peak, set()).add(c.schedule_key)
            if any(len(keys) > 1 for keys in schedules.values()):
                sets.append((f"{of or 'of '}{n:,.0f} parameters", chosen, False))
    return sets


def _shape(curve: Curve) -> Any:
    """Return what makes a size of an architecture: its width and its blocks, or else N."""
    names = ("model.hidden_size", "model.pattern", "model.recursion.times")
    shape = tuple(str(curve.labels.get(name)) for name in names)
    return shape if "model.hidden_size" in curve.labels else curve.parameters


def scaling_sections(paths: Sequence[str | Path], out: Path) -> list[dict[str, Any]]:
    """Fit laws to the loss curves; a sentence reports what cannot be fitted, without a heading."""
    from evals.scaling.figures import draw_curves

    try:
        curves, skipped = read_curves(paths, Reading())
    except UserError as error:
        return [{"sentences": [f"No law is fitted: {error}"]}]
    sections = []
    for number, (what, chosen, sized) in enumerate(scaling_sets(curves)):
        section: dict[str, Any] = {"heading": f"Loss curves {what}", "sentences": list(skipped)}
        sections.append(section)
        try:
            choice = by_identifiability(chosen, (sized, False, False))
            law = curve_law(choice.law, chosen, sized)
            found = bootstrap(fit(law, chosen), chosen, SAMPLES)
        except UserError as error:
            sections[-1] = {"sentences": [f"No law is fitted to the loss curves {what}: {error}"]}
            continue
        path = draw_curves(found, chosen, out / f"scaling-{number}.png")
        section["file"], section["title"] = path, law.title
        section["law"] = f"{law.title}: {law.formula}{' + B N^-beta' if sized else ''}"
        section["parameters"] = [
            {
                "name": p.name,
                "value": readable(found.values[p.name], 5),
                "interval": " to ".join(readable(x, 4) for x in found.intervals[p.name]),
                "unit": p.unit,
                "meaning": p.meaning,
                "note": found.undetermined.get(p.name, ""),
            }
            for p in law.parameters
        ]
        mean = np.mean(list(found.mape().values()))
        end = np.mean(np.abs(list(found.end_errors().values())))
        section["sentences"] += [
            f"{law.title}: {choice.why}",
            f"error of the fitted curves: {mean:.3f} % on average, {end:.3f} % at their ends",
        ]
    if not sections:
        sections.append({"sentences": [_NONE]})
    return sections
