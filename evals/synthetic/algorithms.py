"""Generate tasks of memory and of algorithms: windows of bits, sets, sums, and text.

``n_parity`` is bits, then one question for each of some windows; the target of the question ``N``
is the parity of the last N bits before the questions (arXiv 2309.12927, where a network has one
head for each N; here they are tokens at the end of a row).

``disjointness`` is a long set, a separator, a short set of ``SHORT`` elements and a separator, the
whole ``reads`` times, then the short set's elements again; the target of each is whether the long
set has it too (after set disjointness in arXiv 2407.05483). Whoever reads the long set first has to
keep all of it.

``addition`` is two numbers and their sum, digits from the last to the first. A hint stands before
every digit and says its place; hints count on from a random start, so that short rows use all of
them (arXiv 2310.16028). The target of a hint of the sum is the digit after it.

``bytes`` is source text of this Python's standard library; the target is the next byte. Test rows
are of the last tenth of the files.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from evals.synthetic.rows import Options, Rows, Task

WINDOWS = 32  # the widest window of n_parity
ELEMENTS, SHORT = 64, 4  # of disjointness
HINTS, BASE = 32, 10  # places and digits of addition
_BITS = 3  # tokens 0 and 1, and BOS; the question N is the token 1 + N
_SEPARATOR, _QUESTION, _BOS, _NO, _YES = (ELEMENTS + i for i in range(5))
_PLUS, _EQUALS, _START = BASE + HINTS, BASE + HINTS + 1, BASE + HINTS + 2


def n_parity(generator: np.random.Generator, rows: int, length: int, options: Options) -> Rows:
    """Return rows of BOS, bits, and a question for each of ``windows``."""
    windows = np.array(options.windows)
    end = length - len(windows)
    bits = generator.integers(0, 2, (rows, end - 1))
    tokens = np.empty((rows, length), dtype=np.int64)
    tokens[:, 0], tokens[:, 1:end], tokens[:, end:] = _BITS - 1, bits, 1 + windows
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    scored[:, end:] = True
    for at, window in enumerate(windows):
        targets[:, end + at] = bits[:, -window:].sum(1) % 2
    return Rows(tokens, targets, scored)


def _solve_n_parity(tokens: Sequence[int]) -> list[int]:
    bits = [t for t in tokens if t < 2]
    return [sum(bits[-(t - 1) :]) % 2 if t >= _BITS else -1 for t in tokens]


def disjointness(generator: np.random.Generator, rows: int, length: int, options: Options) -> Rows:
    """Return rows of two sets and questions on them; ``length`` tokens where read once."""
    long = length - 2 * SHORT - 4
    drawn = np.argsort(generator.random((rows, ELEMENTS)), axis=1)[:, : long + SHORT]
    first = drawn[:, :long]
    # Of the short set each element is in the long one with probability 1/2, or is another.
    shared = generator.random((rows, SHORT)) < 1 / 2
    places = np.argsort(generator.random((rows, long)), axis=1)[:, :SHORT]
    short = np.where(shared, np.take_along_axis(first, places, axis=1), drawn[:, long:])
    line = np.full((rows, 1), _SEPARATOR)
    once = [short, line, first, line] if options.short_first else [first, line, short, line]
    order = np.argsort(generator.random((rows, SHORT)), axis=1)
    asked, answers = (np.take_along_axis(x, order, axis=1) for x in (short, shared))
    opening, question = np.full((rows, 1), _BOS), np.full((rows, 1), _QUESTION)
    tokens = np.concatenate([opening, *once * options.reads, question, asked], axis=1)
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    targets[:, -SHORT:], scored[:, -SHORT:] = np.where(answers, _YES, _NO), True
    return Rows(tokens, targets, scored)


def _solve_disjointness(tokens: Sequence[int]) -> list[int]:
    parts: list[list[int]] = [[]]
    for token in tokens[1 : list(tokens).index(_QUESTION)]:
        if token == _SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(token)
    both = set(parts[0]) & set(parts[1])
    answers = [_YES if token in both else _NO for token in tokens[-SHORT:]]
    return [-1] * (len(tokens) - SHORT) + answers


def digits_of(length: int) -> int:
    """Return the digits of each number in a row of ``addition``."""
    return (length - 3) // 6


def addition(generator: np.random.Generator, rows: int, length: int, _: Options) -> Rows:
    """Return rows of ``a + b = c`` with hints, in ``length`` tokens or up to five fewer."""
    count = digits_of(length)
    first, second = generator.integers(0, BASE, (2, rows, count))
    total = np.zeros((rows, count), dtype=np.int64)  # modulo BASE to the power of count
    carry = np.zeros(rows, dtype=np.int64)
    for place in range(count):
        sums = first[:, place] + second[:, place] + carry
        total[:, place], carry = sums % BASE, sums // BASE
    start = generator.integers(0, HINTS - count + 1, (rows, 1))
    hints = BASE + start + np.arange(count)
    signs = [np.full((rows, 1), sign) for sign in (_START, _PLUS, _EQUALS)]
    parts = []
    for sign, number in zip(signs, (first, second, total), strict=True):
        parts += [sign, np.stack([hints, number], axis=2).reshape(rows, 2 * count)]
    tokens = np.concatenate(parts, axis=1)
    targets, scored = np.zeros_like(tokens), np.zeros(tokens.shape, dtype=bool)
    targets[:, -2 * count :: 2], scored[:, -2 * count :: 2] = total, True
    return Rows(tokens, targets, scored)


def _solve_addition(tokens: Sequence[int]) -> list[int]:
    plus, equals = list(tokens).index(_PLUS), list(tokens).index(_EQUALS)
    first, second = (
        sum(digit * BASE**place for place, digit in enumerate(part[1::2]))
        for part in (tokens[1:plus], tokens[plus + 1 : equals])
    )
    answers = [-1] * len(tokens)
    for place, at in enumerate(range(equals + 1, len(tokens), 2)):
        answers[at] = (first + second) // BASE**place % BASE
    return answers


@cache
def library_text() -> np.ndarray:
    """Return the bytes of the standard library's modules, in the order of their names."""
    folder = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    return np.frombuffer(text, dtype=np.uint8)


def library_bytes(generator: np.random.Generator, rows: int, length: int, options: Options) -> Rows:
    """Return rows that begin anywhere in the library's text."""
    text = library_text()
    border = len(text) * 9 // 10
    part = text[border:] if options.held_out else text[:border]
    starts = generator.integers(0, len(part) - length + 1, (rows, 1))
    tokens = part[starts + np.arange(length)].astype(np.int64)
    targets, scored = np.zeros_like(tokens), np.ones(tokens.shape, dtype=bool)
    targets[:, :-1], scored[:, -1] = tokens[:, 1:], False
    return Rows(tokens, targets, scored)


ALGORITHMS = {
    "n_parity": Task(WINDOWS + 2, 1 / 2, n_parity, _solve_n_parity),
    "disjointness": Task(ELEMENTS + 5, 1 / 2, disjointness, _solve_disjointness),
    "addition": Task(BASE + HINTS + 3, 1 / BASE, addition, _solve_addition),
    "bytes": Task(256, 1 / 256, library_bytes, lambda tokens: [*tokens[1:], -1]),
}
