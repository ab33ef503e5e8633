"""Metrics that layers report, merged over layers and processes."""

from __future__ import annotations

import math


def merge_metrics(into: dict[str, float], found: dict[str, float]) -> None:
    """Add up; the largest where a name ends in ``_max``, and what is not a number is largest."""
    for name, value in found.items():
        before = into.get(name, 0.0)
        if not name.endswith("_max"):
            into[name] = before + value
        elif not math.isnan(before):
            into[name] = value if math.isnan(value) else max(before, value)
