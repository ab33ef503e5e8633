"""The space of layer paths: edits of a path, and paths drawn without a search."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

Path = tuple[int, ...]

LONGEST_RUN = 4  # neighbours that one edit leaves out or repeats
MOST_REPEATS = 4
_TRIES = 2000


def edited(path: Path, draw: random.Random, longest: int) -> Path:
    """Return ``path`` with a run of neighbours left out or repeated.

    At least one block stays, and at most ``longest``.
    """
    while True:
        count = draw.randint(1, min(LONGEST_RUN, len(path)))
        start = draw.randint(0, len(path) - count)
        before, run, after = path[:start], path[start : start + count], path[start + count :]
        if draw.random() < 0.5:
            found = before + after
        else:
            found = before + run * (1 + draw.randint(1, MOST_REPEATS)) + after
        if 1 <= len(found) <= longest:
            return found


def random_paths(
    lengths: Sequence[int],
    identity: Path,
    draw: random.Random,
    allowed: Callable[[Path], bool],
) -> list[Path]:
    """Return a path of each of ``lengths``, by edits that nothing chose.

    They are different from each other as far as the space has as many.
    """
    longest, found = max(lengths), list[Path]()
    for length in lengths:
        path, fallback = identity, None
        for _ in range(_TRIES):
            path = edited(path, draw, longest)
            if len(path) == length and allowed(path):
                fallback = path
                if path not in found:
                    break
            if draw.random() < 0.3:
                path = identity
        if fallback is not None:
            found.append(fallback)
    return found
