"""Say once what is to be said of many curves."""

from __future__ import annotations

import re
from collections.abc import Iterable

NAMED = 4  # curves of one note that are named


def grouped(warnings: Iterable[str]) -> list[str]:
    """Return ``CURVE: sentence`` warnings with those alike, but for numbers and names, as one.

    Where their numbers differ, the first curve's are shown.
    """
    groups: dict[str, list[tuple[str, str]]] = {}
    for warning in warnings:
        curve, _, sentence = warning.partition(": ")
        alike = re.sub(r"[-+]?\d[\d,.]*(e[-+]?\d+)?", "0", sentence)
        alike = re.sub(r"(learning rates of) \S+", r"\1", alike)
        groups.setdefault(alike, []).append((curve, sentence))
    result = []
    for group in groups.values():
        curves = [curve for curve, _ in group]
        named = ", ".join(curves[:NAMED])
        if len(curves) > NAMED:
            named += f" and {len(curves) - NAMED} others"
        same = len({sentence for _, sentence in group}) == 1
        if same:
            result.append(f"{named}: {group[0][1]}")
        else:
            others = ", ".join(curves[1 : NAMED + 1])
            if len(curves) > NAMED + 1:
                others += f" and {len(curves) - NAMED - 1} others"
            result.append(f"{curves[0]}: {group[0][1]}; {others} likewise")
    return result
