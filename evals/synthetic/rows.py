"""Hold what synthetic tasks are made of: rows, options, and a task's four parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """A batch: ``[B, T]`` int64 tokens and targets, and in ``scored`` which targets count."""

    tokens: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Options:
    """What some tasks ask for besides a length; each matters to the task that it names.

    Attributes:
        tokens_per_pair: of ``mqar``, tokens of a row for each key-value pair.
        windows: of ``n_parity``, the numbers of bits whose parities are asked for.
        reads: of ``disjointness``, how often both sets are shown.
        short_first: of ``disjointness``, whether the short set comes before the long one.
        held_out: of ``bytes``, whether rows are of text that no training row is of.
    """

    tokens_per_pair: int = 8
    windows: tuple[int, ...] = (2,)
    reads: int = 1
    short_first: bool = False
    held_out: bool = False


@dataclass(frozen=True)
class Task:
    """A synthetic task.

    ``make`` takes (generator, number of rows, length, options); ``chance`` is the accuracy of a
    guess; ``solve`` returns the targets of one row's tokens by the definition alone, -1 where none
    counts.
    """

    vocab_size: int
    chance: float
    make: Callable[[np.random.Generator, int, int, Options], Rows]
    solve: Callable[[Sequence[int]], list[int]]
