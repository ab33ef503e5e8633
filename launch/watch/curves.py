"""Curves of bounded length: means of as many neighbouring lines as it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

MOST = 200  # points of a curve, at least half as many of a long one


class Curve:
    """Weighted means of the lines of a log by name, of at most :data:`MOST` groups of neighbours.

    When the groups have become too many, each two are made one, so that memory and time do not grow
    with the run. A name without a value in a whole group is None there.
    """

    def __init__(self, names: Sequence[str]):
        self._names = tuple(names)
        self._lines = 1  # of a full group
        self._in_last = 0
        self._groups: list[list[float]] = []  # for each name the sum of value * weight, of weights

    def add(self, values: Mapping[str, float | None], weights: Mapping[str, float]) -> None:
        """Add a line; a name without a weight has weight 1."""
        if not self._groups or self._in_last == self._lines:
            if len(self._groups) == MOST:
                pairs = zip(self._groups[::2], self._groups[1::2], strict=True)
                self._groups = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
                self._lines *= 2
            self._groups.append([0.0] * (2 * len(self._names)))
            self._in_last = 0
        self._in_last += 1
        group = self._groups[-1]
        for index, name in enumerate(self._names):
            value, weight = values.get(name), weights.get(name, 1.0)
            if value is not None:
                group[2 * index] += value * weight
                group[2 * index + 1] += weight

    def points(self) -> dict[str, list[float | None]]:
        """Return the means of every group, by name."""
        return {
            name: [_rounded(g[2 * i], g[2 * i + 1]) for g in self._groups]
            for i, name in enumerate(self._names)
        }

    def mean(self, name: str) -> float | None:
        """Return the mean over all lines; None where none has a value."""
        index = 2 * self._names.index(name)
        weight = sum(group[index + 1] for group in self._groups)
        return sum(group[index] for group in self._groups) / weight if weight else None


def _rounded(total: float, weight: float) -> float | None:
    return float(f"{total / weight:.6g}") if weight else None
