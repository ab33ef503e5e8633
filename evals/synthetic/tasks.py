"""Generate synthetic tasks: rows of tokens, a target for each, and which targets count.

``s3``, ``s4``, ``a5``, ``s5``, ``z60``, ``parity`` and ``modular_addition`` are word problems of a
group: a row is BOS and ``length - 1`` group elements, independent and uniform; the target of every
element is the product of all elements so far (arXiv 2502.10297, section 5; automl/DeltaProduct;
arXiv 2404.08819). BOS lets a layer whose state starts at zero write something for the elements to
act on. ``z60`` commutes and has as many elements as ``a5``, which is not even solvable.

``modular_arithmetic`` is a formula of digits below 5 joined by +, - and *; the target of every
digit is the value of the formula so far, modulo 5, products before sums (arXiv 2207.02098).

``copying`` is a text, a separator, and the text again; from the separator on, the target is the
next token of the copy. ``induction`` is random tokens of which the last occurred once before; its
target is the token that followed it then (arXiv 2209.11895).

``mqar`` is multi-query associative recall (arXiv 2312.04927; HazyResearch/zoology): alternating
keys and values, then every key again, at gaps that follow a power law, among filler; the target of
a repeated key is its value, and nothing else counts. Keys and values are drawn for each row.

``n_parity``, ``disjointness``, ``addition`` and ``bytes`` are in :mod:`.algorithms`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate, permutations
from typing import Literal

import numpy as np

from evals.synthetic.algorithms import ALGORITHMS
from evals.synthetic.rows import Options, Rows, Task

MODULUS, LETTERS = 5, 32
MQAR_KEYS = 64  # tokens 1 to 64; the values are the 64 after them, 0 is filler
_GAP_POWER = 0.01
_STREAMS = {"train": 0, "test": 1, "check": 2}


def elements_of(things: int, *, even: bool = False) -> list[tuple[int, ...]]:
    """Return the permutations of ``things`` objects in lexicographic order, or the even ones."""
    return [p for p in permutations(range(things)) if not even or _is_even(p)]


def _is_even(permutation: tuple[int, ...]) -> bool:
    inversions = sum(a > b for i, a in enumerate(permutation) for b in permutation[i + 1 :])
    return inversions % 2 == 0


def permutation_table(elements: list[tuple[int, ...]]) -> np.ndarray:
    """Return the group's table ``[n, n]``: entry (a, b) is a after b, (a b)(i) = a(b(i))."""
    number = {p: i for i, p in enumerate(elements)}
    return np.array([[number[tuple(a[i] for i in b)] for b in elements] for a in elements])


def cyclic_table(n: int) -> np.ndarray:
    """Return the table ``[n, n]`` of addition modulo n."""
    return np.add.outer(np.arange(n), np.arange(n)) % n


def word_problem(table: np.ndarray, generator: np.random.Generator, rows: int, length: int) -> Rows:
    """Return rows of group elements whose targets are the running products.

    ``table[a, b]`` is the element a b; element 0 is the identity, and the token after the last
    element is BOS.
    """
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
    """Return rows of ``pairs`` keys and values, then the keys again; even ``length >= 4 pairs``."""
    row = np.arange(rows)[:, None]
    keys = 1 + _distinct(generator, rows, MQAR_KEYS, pairs)
    values = 1 + MQAR_KEYS + _distinct(generator, rows, MQAR_KEYS, pairs)
    tokens = np.zeros((rows, length), dtype=np.int64)
    tokens[:, 0 : 2 * pairs : 2], tokens[:, 1 : 2 * pairs : 2] = keys, values
    gaps = np.arange(1, (length - 2 * pairs) // 2 + 1)
    # The largest of log p + Gumbel noise are a sample without replacement, in the order drawn.
    noise = generator.gumbel(size=(rows, len(gaps)))
    chosen = np.argsort(-((_GAP_POWER - 1) * np.log(gaps) + noise), axis=1)[:, :pairs]
    at = 2 * pairs + 2 * chosen
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    tokens[row, at], targets[row, at], scored[row, at] = keys, values, True
    return Rows(tokens, targets, scored)


def _distinct(generator: np.random.Generator, rows: int, n: int, count: int) -> np.ndarray:
    """Return ``[rows, count]`` numbers below n, different within each row."""
    return np.argsort(generator.random((rows, n)), axis=1)[:, :count]


def modular_arithmetic(generator: np.random.Generator, rows: int, length: int) -> Rows:
    """Return rows of BOS and alternating digits and operators, with the formula's values."""
    digits = generator.integers(0, MODULUS, (rows, length))
    operators = MODULUS + generator.integers(0, 3, (rows, length))
    tokens = np.where(np.arange(length) % 2 == 1, digits, operators)
    tokens[:, 0] = MODULUS + 3
    targets = np.zeros_like(tokens)
    # The value is total + sign * product; a product continues until a + or -.
    total, product = np.zeros(rows, dtype=np.int64), tokens[:, 1].copy()
    scored = np.zeros(tokens.shape, dtype=bool)
    for t in range(1, length, 2):
        if t > 1:
            operator, digit = tokens[:, t - 1] - MODULUS, tokens[:, t]
            times = operator == 2
            total = np.where(times, total, total + product)
            sign = np.where(operator == 1, -1, 1)
            product = np.where(times, product * digit, sign * digit) % MODULUS
        targets[:, t], scored[:, t] = (total + product) % MODULUS, True
    return Rows(tokens, targets, scored)


def copying(generator: np.random.Generator, rows: int, length: int) -> Rows:
    """Return rows of ``(length - 1) // 2`` letters, a separator (0) and the letters again."""
    half = (length - 1) // 2
    tokens = np.zeros((rows, length), dtype=np.int64)
    tokens[:, :half] = 1 + generator.integers(0, LETTERS, (rows, half))
    tokens[:, half + 1 : 2 * half + 1] = tokens[:, :half]
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    targets[:, half : 2 * half] = tokens[:, :half]
    scored[:, half : 2 * half] = True
    return Rows(tokens, targets, scored)


def induction(generator: np.random.Generator, rows: int, length: int) -> Rows:
    """Return rows whose last token occurred once before; its target is the token after that."""
    tokens = 1 + generator.integers(0, LETTERS - 1, (rows, length))
    earlier = generator.integers(0, length - 2, rows)
    row = np.arange(rows)
    tokens[row, earlier] = tokens[:, -1] = LETTERS  # a letter that occurs nowhere else
    swap = 1 + generator.permuted(np.tile(np.arange(LETTERS), (rows, 1)), axis=1)
    tokens = swap[row[:, None], tokens - 1]
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    targets[:, -1], scored[:, -1] = tokens[row, earlier + 1], True
    return Rows(tokens, targets, scored)


def _group(table: np.ndarray, product: Callable[[int, int], int]) -> Task:
    return Task(
        len(table) + 1,
        1 / len(table),
        lambda generator, rows, length, _: word_problem(table, generator, rows, length),
        lambda tokens: [-1, *accumulate(tokens[1:], product)],
    )


def _permutations(things: int, *, even: bool = False) -> Task:
    elements = elements_of(things, even=even)

    def product(a: int, b: int) -> int:
        return elements.index(tuple(elements[a][i] for i in elements[b]))

    return _group(permutation_table(elements), product)


def _cyclic(n: int) -> Task:
    return _group(cyclic_table(n), lambda a, b: (a + b) % n)


def _solve_formula(tokens: Sequence[int]) -> list[int]:
    written = [str(t) if t < MODULUS else "+-*"[t - MODULUS] for t in tokens[1:]]
    values = [
        eval("".join(written[: end + 1])) % MODULUS if end % 2 == 0 else -1  # digits and + - *
        for end in range(len(written))
    ]
    return [-1, *values]


def _solve_copying(tokens: Sequence[int]) -> list[int]:
    half = list(tokens).index(0)
    return [-1] * half + list(tokens[:half]) + [-1] * (len(tokens) - 2 * half)


def _solve_induction(tokens: Sequence[int]) -> list[int]:
    return [-1] * (len(tokens) - 1) + [tokens[list(tokens).index(tokens[-1]) + 1]]


def _solve_recall(tokens: Sequence[int]) -> list[int]:
    known: dict[int, int] = {}
    answers = []
    for here, after in zip(tokens, [*tokens[1:], 0], strict=True):
        if 0 < here <= MQAR_KEYS and here in known:
            answers.append(known[here])
        else:
            answers.append(-1)
            if 0 < here <= MQAR_KEYS:
                known[here] = after
    return answers


TASKS: dict[str, Task] = {
    "s3": _permutations(3),
    "s4": _permutations(4),
    "a5": _permutations(5, even=True),
    "s5": _permutations(5),
    "z60": _cyclic(60),
    "parity": _cyclic(2),
    "modular_addition": _cyclic(MODULUS),
    "modular_arithmetic": Task(
        MODULUS + 4,
        1 / MODULUS,
        lambda g, rows, length, _: modular_arithmetic(g, rows, length),
        _solve_formula,
    ),
    "copying": Task(
        LETTERS + 1,
        1 / LETTERS,
        lambda g, rows, length, _: copying(g, rows, length),
        _solve_copying,
    ),
    "induction": Task(
        LETTERS + 1,
        1 / (LETTERS - 1),
        lambda g, rows, length, _: induction(g, rows, length),
        _solve_induction,
    ),
    "mqar": Task(
        2 * MQAR_KEYS + 1,
        1 / MQAR_KEYS,
        lambda generator, rows, length, options: associative_recall(
            generator, rows, length, length // options.tokens_per_pair
        ),
        _solve_recall,
    ),
    **ALGORITHMS,
}


def make_rows(
    task: str,
    *,
    seed: int,
    stream: Literal["train", "test", "check"],
    index: int,
    rows: int,
    length: int,
    options: Options | None = None,
) -> Rows:
    """Return batch ``index`` of a stream, a function of the arguments alone.

    Batches are independent for different seeds, streams and indices.
    """
    generator = np.random.default_rng([seed, _STREAMS[stream], index])
    options = replace(options or Options(), held_out=stream == "test")
    return TASKS[task].make(generator, rows, length, options)
