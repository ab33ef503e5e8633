"""Texts of any length with something to find in them, after RULER (arXiv 2404.06654).

Needles in a haystack (single 1 to 3, several keys, values or queries), variable tracking, common
and frequent words, and the passkey (arXiv 2305.16300). Prompts and needles are RULER's; its essays
are replaced by the sentences of :func:`.words.essay_sentences`, its word lists by ours.

A generator takes random numbers and a size, the number of units of its haystack, and returns a
text; :func:`make_texts` finds the size that fills a length.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from evals.synthetic.words import ADJECTIVES, NOISE, NOUNS, essay_sentences

STREAMS = {"test": 0, "train": 1}
_DEPTHS = 40  # evenly spaced positions that a needle may have


@dataclass(frozen=True)
class Text:
    """A prompt, and all the words that a right answer contains."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class LongTask:
    """A long-context task.

    ``make`` takes (generator, size) and returns a text; ``max_tokens`` limits an answer; ``solve``
    finds a prompt's answers by reading it.
    """

    make: Callable[[np.random.Generator, int], Text]
    max_tokens: int
    solve: Callable[[str], list[str]]


def needles(
    generator: np.random.Generator,
    size: int,
    *,
    haystack: str,
    keys: int = 1,
    values: int = 1,
    queries: int = 1,
    uuid: bool = False,
) -> Text:
    """Hide magic numbers (or uuids), ``values`` for each of ``keys``, in ``size`` sentences.

    The text asks for those of ``queries`` keys. ``haystack`` is noise, essay, or needles (more
    keys).
    """
    kind = "uuid" if uuid else "number"
    if haystack == "needles":
        keys = max(size, 1)
    names = _names(generator, max(keys, queries))
    numbers = {name: [_value(generator, uuid) for _ in range(values)] for name in names}
    hidden = [
        f"One of the special magic {kind}s for {name} is: {value}."
        for name, listed in numbers.items()
        for value in listed
    ]
    hidden = [hidden[i] for i in generator.permutation(len(hidden))]
    if haystack == "needles":
        lines = hidden
    elif haystack == "noise":
        lines = _hide(generator, [NOISE] * size, hidden)
    else:
        essay = essay_sentences()
        lines = _hide(generator, [essay[i % len(essay)] for i in range(size)], hidden)
    asked = [names[i] for i in generator.permutation(len(names))[:queries]]
    plural = values * queries > 1
    which = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    what = f"all the special magic {kind}s" if plural else f"the special magic {kind}"
    joint = "\n" if haystack != "essay" else " "
    prompt = (
        f"Some special magic {kind}s are hidden within the following text. Make sure to memorize "
        f"{'them' if plural else 'it'}. I will quiz you about the {kind}s afterwards.\n"
        f"{joint.join(lines)}\nWhat {'are' if plural else 'is'} {what} for {which} mentioned in "
        f"the provided text? The special magic {kind}{'s' if plural else ''} for {which} mentioned "
        f"in the provided text {'are' if plural else 'is'}"
    )
    return Text(prompt, [value for name in asked for value in numbers[name]])


def _solve_needles(prompt: str) -> list[str]:
    numbers: dict[str, list[str]] = {}
    pattern = r"One of the special magic \w+ for (\S+) is: (\S+)\."
    for name, value in re.findall(pattern, prompt):
        numbers.setdefault(name, []).append(value)
    question = prompt.rpartition("What ")[2].partition(" mentioned in")[0]
    asked = re.split(r", and |, ", question.partition(" for ")[2])
    return [value for name in asked for value in numbers[name]]


def variable_tracking(generator: np.random.Generator, size: int, *, hops: int = 4) -> Text:
    """Hide a chain of ``hops`` assignments in noise, and ask which variables have its value."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(generator.choice(letters, 5))
        if name not in names:
            names.append(name)
    value = str(generator.integers(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names)]
    lines = _hide(generator, [NOISE] * size, chain, in_order=True)
    prompt = (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
        + "\n".join(lines)
        + f"\nQuestion: Find all variables that are assigned the value {value} in the text above. "
        f"Answer: According to the chain(s) of variable assignment in the text above, {hops + 1} "
        f"variables are assigned the value {value}, they are:"
    )
    return Text(prompt, names)


def _solve_variables(prompt: str) -> list[str]:
    text, _, question = prompt.partition("\nQuestion:")
    wanted = re.findall(r"the value (\d+)", question)[0]
    values: dict[str, str] = {}
    for name, other, number in re.findall(r"VAR (\w+) = (?:VAR (\w+)|(\d+))", text):
        values[name] = number or values[other]
    return [name for name, value in values.items() if value == wanted]


def common_words(generator: np.random.Generator, size: int) -> Text:
    """List 10 words 30 times and ``size`` others 3 times, and ask for the most common ones."""
    common, rest = 10, max(size, 1)
    words = _names(generator, common + rest)
    listed = words[:common] * 30 + words[common:] * 3
    order = generator.permutation(len(listed))
    lines = " ".join(f"{i}. {listed[j]}" for i, j in enumerate(order, 1))
    prompt = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        f"Memorize the ones that appear most often.\n{lines}\nQuestion: What are the {common} most "
        f"common words in the above list? Answer: The top {common} words that appear most often in "
        "the list are:"
    )
    return Text(prompt, words[:common])


def _solve_common(prompt: str) -> list[str]:
    listed = prompt.split("\n")[1]
    counts = Counter(re.findall(r"\d+\. (\S+)", listed))
    return [word for word, _ in counts.most_common(10)]


def frequent_words(generator: np.random.Generator, size: int, *, alpha: float = 2.0) -> Text:
    """Write coded words with frequencies k^-alpha, and ask for the top three after the noise."""
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    count = max(size, 20)
    vocabulary = ["".join(generator.choice(letters, 6)) for _ in range(max(count // 10, 10))]
    vocabulary = list(dict.fromkeys(vocabulary))
    shares = np.arange(1, len(vocabulary) + 1, dtype=float) ** -alpha
    often = np.maximum((count * shares / shares.sum()).astype(int), 1)
    often[1:4] = np.maximum(often[1:4], [7, 6, 5])  # distinguishable at any length
    coded = ["..." if i == 0 else word for i, word in enumerate(vocabulary)]
    words = [
        coded[i] for i, n in enumerate(often) for _ in range(min(n, often[3] - 1) if i > 3 else n)
    ]
    text = " ".join(words[i] for i in generator.permutation(len(words)))
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three "
        f"most frequently appeared coded words. {text}\nQuestion: Do not provide any explanation. "
        "Please ignore the dots '....'. What are the three most frequently appeared words in the "
        "above coded text? Answer: According to the coded text above, the three most frequently "
        "appeared words are:"
    )
    return Text(prompt, coded[1:4])


def _solve_frequent(prompt: str) -> list[str]:
    text = prompt.partition("coded words. ")[2].partition("\nQuestion:")[0]
    counts = Counter(word for word in text.split() if word != "...")
    return [word for word, _ in counts.most_common(3)]


def passkey(generator: np.random.Generator, size: int) -> Text:
    """Hide a number of five digits in noise."""
    key = str(generator.integers(10_000, 100_000))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    lines = _hide(generator, [NOISE] * size, [needle])
    prompt = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "it. I will quiz you about the important information there.\n"
        + "\n".join(lines)
        + "\nWhat is the pass key? The pass key is"
    )
    return Text(prompt, [key])


def _names(generator: np.random.Generator, count: int) -> list[str]:
    """Return different pairs of an adjective and a noun, with two adjectives if those run out."""
    pairs, names = len(ADJECTIVES) * len(NOUNS), []
    longer = count > 2_000
    numbers = generator.choice(
        pairs * (len(ADJECTIVES) if longer else 1), count, replace=False
    ).tolist()
    for number in numbers:
        rest, noun = divmod(number % pairs, len(NOUNS))
        first = f"{ADJECTIVES[number // pairs]}-" if longer else ""
        names.append(f"{first}{ADJECTIVES[rest]}-{NOUNS[noun]}")
    return names


def _value(generator: np.random.Generator, uuid: bool) -> str:
    if not uuid:
        return str(generator.integers(10**6, 10**7))
    digits = "".join(f"{n:x}" for n in generator.integers(0, 16, 32))
    parts = (digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:])
    return "-".join(parts)


def _hide(
    generator: np.random.Generator, lines: list[str], hidden: list[str], *, in_order: bool = False
) -> list[str]:
    """Insert ``hidden`` at some of 40 depths of ``lines``."""
    depths = generator.choice(_DEPTHS, len(hidden), replace=len(hidden) > _DEPTHS)
    positions = np.round(depths / (_DEPTHS - 1) * len(lines)).astype(int)
    if in_order:
        positions = np.sort(positions)
    at: dict[int, list[str]] = {}
    for position, line in zip(positions.tolist(), hidden, strict=True):
        at.setdefault(position, []).append(line)
    found: list[str] = []
    for number in range(len(lines) + 1):
        found += at.get(number, [])
        found += lines[number : number + 1]
    return found


def _needle_task(**options: Any) -> LongTask:
    return LongTask(
        lambda generator, size: needles(generator, size, **options), 128, _solve_needles
    )


LONG_TASKS: dict[str, LongTask] = {
    "niah_single_1": _needle_task(haystack="noise"),
    "niah_single_2": _needle_task(haystack="essay"),
    "niah_single_3": _needle_task(haystack="essay", uuid=True),
    "niah_multikey_1": _needle_task(haystack="essay", keys=4),
    "niah_multikey_2": _needle_task(haystack="needles"),
    "niah_multikey_3": _needle_task(haystack="needles", uuid=True),
    "niah_multivalue": _needle_task(haystack="essay", values=4),
    "niah_multiquery": _needle_task(haystack="essay", keys=4, queries=4),
    "ruler_vt": LongTask(variable_tracking, 30, _solve_variables),
    "ruler_cwe": LongTask(common_words, 120, _solve_common),
    "ruler_fwe": LongTask(frequent_words, 50, _solve_frequent),
    "passkey": LongTask(
        passkey, 16, lambda prompt: re.findall(r"The pass key is (\d+)\. Remember", prompt)
    ),
}


def make_texts(
    task: str,
    *,
    count: int,
    length: int,
    tokens: Callable[[str], int],
    seed: int = 0,
    stream: str = "test",
) -> list[Text]:
    """Return ``count`` texts that fill up to ``length`` tokens together with their answers.

    They are a function of the arguments alone, and ``train`` is independent of ``test``.
    ``tokens`` counts a text's tokens. Raises ValueError where even the shortest text is too long.
    """
    spec = LONG_TASKS[task]
    room = length - spec.max_tokens

    def text(number: int, size: int) -> Text:
        return spec.make(np.random.default_rng([seed, STREAMS[stream], number]), size)

    def fits(number: int, size: int) -> bool:
        return tokens(text(number, size).prompt) <= room

    if not fits(0, 1):
        raise ValueError(
            f"{task}: the shortest text has {tokens(text(0, 1).prompt):,} tokens and needs "
            f"{spec.max_tokens} more for its answer, expected at most {length:,}"
        )
    high = 2
    while fits(0, high):
        high *= 2
    low = high // 2
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(0, middle) else (low, middle)
    found = []
    for number in range(count):
        size = low
        while size > 1 and not fits(number, size):
            size = min(size - 1, size * 99 // 100)
        found.append(text(number, max(size, 1)))
    return found
