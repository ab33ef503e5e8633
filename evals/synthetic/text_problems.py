"""The tasks of :mod:`.tasks` in English, for models that were trained on text.

A problem is a prompt and either choices, of which one is right, or an answer to be generated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evals.synthetic.long_context import STREAMS
from evals.synthetic.rows import Options
from evals.synthetic.tasks import MODULUS, TASKS, elements_of
from evals.synthetic.words import NOUNS

_CHOICES = 4  # if there are too many to list all


@dataclass(frozen=True)
class Problem:
    """A prompt with its answer; ``choices`` are empty where the answer is to be generated."""

    prompt: str
    answer: str
    choices: list[str]

    @property
    def gold(self) -> int:
        """The index of the right choice."""
        return self.choices.index(self.answer)


def _sum(modulus: int) -> Callable[[np.random.Generator, int], Problem]:
    def make(generator: np.random.Generator, length: int) -> Problem:
        numbers = generator.integers(0, modulus, length)
        shown = " + ".join(map(str, numbers))
        answer = str(int(numbers.sum()) % modulus)
        return Problem(f"Modulo {modulus}, {shown} =", answer, [str(n) for n in range(modulus)])

    return make


def _formula(generator: np.random.Generator, length: int) -> Problem:
    tokens = (
        TASKS["modular_arithmetic"].make(generator, 1, 2 * length, Options()).tokens[0].tolist()
    )
    answer = str(TASKS["modular_arithmetic"].solve(tokens)[-1])
    shown = " ".join(str(t) if t < MODULUS else "+-*"[t - MODULUS] for t in tokens[1:])
    return Problem(f"Modulo {MODULUS}, {shown} =", answer, [str(n) for n in range(MODULUS)])


def _permutations(things: int, *, even: bool = False) -> Callable[..., Problem]:
    elements = elements_of(things, even=even)
    cups = "ABCDE"[:things]

    def row(order: Sequence[int]) -> str:
        return " ".join(cups[i] for i in order)

    def make(generator: np.random.Generator, length: int) -> Problem:
        steps = [elements[i] for i in generator.integers(0, len(elements), length)]
        state: tuple[int, ...] = tuple(range(things))
        for step in steps:
            state = tuple(state[i] for i in step)
        others = [e for e in elements if e != state]
        if len(elements) > 6:
            others = [others[i] for i in generator.permutation(len(others))[: _CHOICES - 1]]
        choices = [row(state), *map(row, others)]
        choices = [choices[i] for i in generator.permutation(len(choices))]
        listed = "; ".join(" ".join(str(i + 1) for i in step) for step in steps)
        prompt = (
            f"{things} cups stand in a row: {row(range(things))}. Each step makes a new row out of "
            f"the cups at these places of the old one. Steps: {listed}. The row is now:"
        )
        return Problem(prompt, row(state), choices)

    return make


def _words(generator: np.random.Generator, count: int) -> list[str]:
    if count > len(NOUNS):
        raise ValueError(f"length is {count}, expected at most {len(NOUNS)}, the number of words")
    return [NOUNS[i] for i in generator.permutation(len(NOUNS))[:count]]


def _copying(generator: np.random.Generator, length: int) -> Problem:
    text = " ".join(_words(generator, length))
    return Problem(f"Text: {text}\nThe same text once more:", text, [])


def _induction(generator: np.random.Generator, length: int) -> Problem:
    words = _words(generator, max(length, 3))
    at = int(generator.integers(0, len(words) - 2))
    return Problem(f"{' '.join([*words, words[at]])}", words[at + 1], [])


def _recall(generator: np.random.Generator, length: int) -> Problem:
    words = _words(generator, 2 * length)
    pairs = list(zip(words[:length], words[length:], strict=True))
    key, value = pairs[int(generator.integers(length))]
    listed = "\n".join(f"{a}: {b}" for a, b in pairs)
    return Problem(f"{listed}\n\nOnce more:\n{key}:", value, [])


PROBLEMS: dict[str, Callable[[np.random.Generator, int], Problem]] = {
    "text_parity": _sum(2),
    "text_modular_addition": _sum(MODULUS),
    "text_z60": _sum(60),
    "text_modular_arithmetic": _formula,
    "text_s3": _permutations(3),
    "text_s4": _permutations(4),
    "text_a5": _permutations(5, even=True),
    "text_s5": _permutations(5),
    "text_copying": _copying,
    "text_induction": _induction,
    "text_mqar": _recall,
}
DEFAULT_LENGTH = 16  # group elements, digits, words or pairs


def make_problems(
    task: str, *, count: int, length: int, seed: int = 0, stream: str = "test"
) -> list[Problem]:
    """Return problems, a function of the arguments alone; ``train`` is independent of ``test``.

    Raises ValueError for a length that is too large.
    """
    return [
        PROBLEMS[task](np.random.default_rng([seed, STREAMS[stream], number]), length)
        for number in range(count)
    ]
