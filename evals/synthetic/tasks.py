"""Generators of synthetic tasks: rows of tokens, a target for each, and which targets count.

``s3``, ``parity`` and ``modular_addition`` are word problems of a group: a row is BOS and
``length - 1`` group elements, independent and uniform; the target of every element is the product
of all elements so far (arXiv 2502.10297, section 5; automl/DeltaProduct). BOS lets a layer whose
state starts at zero write something for the elements to act on.

``mqar`` is multi-query associative recall (arXiv 2312.04927; HazyResearch/zoology): keys and values
in turn, then every key once more, at gaps that follow a power law, among filler; the target of a
repeated key is its value, and nothing else counts. Each row has keys and values of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np

MQAR_KEYS = 64  # tokens 1 to 64; the values are the 64 after them, 0 is filler
_GAP_POWER = 0.01
_STREAMS = {"train": 0, "test": 1}


@dataclass(frozen=True)
class Rows:
    """tokens, targets: ``[B, T]`` int64; scored: ``[B, T]`` bool, the targets that count."""

    tokens: np.ndarray
    targets: np.ndarray
    scored: np.ndarray


@dataclass(frozen=True)
class Task:
    """make: (generator, number of rows, length, tokens per key-value pair) to rows; chance: the
    accuracy of a guess; tokens_per_pair matters to ``mqar`` alone."""

    vocab_size: int
    chance: float
    make: Callable[[np.random.Generator, int, int, int], Rows]


def s3_table() -> np.ndarray:
    """The product of the six permutations of three things in lexicographic order, ``[6, 6]``:
    entry (a, b) is a after b, (a b)(i) = a(b(i))."""
    elements = list(permutations(range(3)))
    product = [[tuple(a[i] for i in b) for b in elements] for a in elements]
    return np.array([[elements.index(p) for p in row] for row in product])


def cyclic_table(n: int) -> np.ndarray:
    """Addition modulo n, ``[n, n]``."""
    return np.add.outer(np.arange(n), np.arange(n)) % n


def word_problem(table: np.ndarray, generator: np.random.Generator, rows: int, length: int) -> Rows:
    """Running products; ``table[a, b]`` is the element a b, element 0 the neutral one and the token
    after the last element BOS."""
    order = len(table)
    tokens = generator.integers(0, order, (rows, length))
    tokens[:, 0] = order
    targets = np.zeros_like(tokens)
    for t in range(1, length):
        targets[:, t] = table[targets[:, t - 1], tokens[:, t]]
    scored = np.ones(tokens.shape, dtype=bool)
    scored[:, 0] = False
    return Rows(tokens, targets, scored)


def associative_recall(generator: np.random.Generator, rows: int, length: int, pairs: int) -> Rows:
    """``pairs`` keys and values, then the keys again; needs an even ``length >= 4 pairs``."""
    row = np.arange(rows)[:, None]
    keys = 1 + _distinct(generator, rows, MQAR_KEYS, pairs)
    values = 1 + MQAR_KEYS + _distinct(generator, rows, MQAR_KEYS, pairs)
    tokens = np.zeros((rows, length), dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    # The largest of log p + Gumbel noise are a draw without replacement, in order of the draw.
    noise = generator.gumbel(size=(rows, len(gaps)))
    chosen = np.argsort(-((_GAP_POWER - 1) * np.log(gaps) + noise), axis=1)[:, :pairs]
    places = 2 * pairs + 2 * chosen
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    tokens[row, places], targets[row, places], scored[row, places] = keys, values, True
    return Rows(tokens, targets, scored)


def _distinct(generator: np.random.Generator, rows: int, n: int, count: int) -> np.ndarray:
    """``count`` different numbers below n in each row, ``[rows, count]``."""
    return np.argsort(generator.random((rows, n)), axis=1)[:, :count]


def _word_problem(table: np.ndarray) -> Task:
    return Task(
        len(table) + 1, 1 / len(table),
        lambda generator, rows, length, _: word_problem(table, generator, rows, length),
    )  # fmt: skip


TASKS: dict[str, Task] = {
    "s3": _word_problem(s3_table()),
    "parity": _word_problem(cyclic_table(2)),
    "modular_addition": _word_problem(cyclic_table(5)),
    "mqar": Task(
        2 * MQAR_KEYS + 1, 1 / MQAR_KEYS,
        lambda generator, rows, length, tokens_per_pair: associative_recall(
            generator, rows, length, length // tokens_per_pair
        ),
    ),
}  # fmt: skip


def make_rows(
    task: str, *, seed: int, stream: Literal["train", "test"], index: int, rows: int, length: int,
    tokens_per_pair: int = 8,
) -> Rows:  # fmt: skip
    """Batch ``index`` of a stream: a function of the arguments alone, independent for each seed,
    stream and index."""
    generator = np.random.default_rng([seed, _STREAMS[stream], index])
    return TASKS[task].make(generator, rows, length, tokens_per_pair)
