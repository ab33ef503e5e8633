"""Families of tasks that are made here: what a module of this package declares to be found.

A module's ``FAMILIES`` is a sequence of :class:`TaskFamily`; :mod:`.loading` looks for it in every
module of this package, so that a new family is one file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.common.errors import UserError

VERSION = 1
COUNT = 500  # RULER's


@dataclass(frozen=True)
class TextSettings:
    """Settings of generated texts.

    ``tokens`` counts a text's tokens, including the one that it begins with; ``max_length`` is a
    request's limit in tokens, which ``length_option`` sets; ``count`` is the number of documents
    per task.
    """

    tokens: Callable[[str], int]
    max_length: int
    count: int = COUNT
    seed: int = 0
    length_option: str = "--max-length "


def parse_name(name: str) -> tuple[str, int | None]:
    """Split ``TASK@LENGTH`` into the task and its length or None.

    Raises UserError for a length that is not a positive number.
    """
    task, at, length = name.partition("@")
    if at and (not length.isdecimal() or int(length) < 1):
        raise UserError(f"--tasks names '{name}', expected {task}@LENGTH, such as {task}@1024")
    return task, int(length) if at else None


@dataclass(frozen=True)
class TaskFamily:
    """Tasks that have a place of their own in the list of ``python -m evals tasks``."""

    title: str
    tasks: tuple[str, ...]
    """Their names."""
    config: Callable[[str, TextSettings], dict[str, Any]]
    """Returns lm-eval's settings of a task by its full name. Raises UserError for a length that
    the task cannot have."""
    has_length: bool = True
    """Whether a name may be followed by ``@LENGTH``, which ``config`` then reads."""


def share_of_answers(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Score a text by the share of the answers in it; this is lm-eval's ``process_results``."""
    text = results[0].lower()
    found = [answer.lower() in text for answer in document["answers"]]
    return {"contains": sum(found) / len(found)}


def shared_settings(
    name: str, length: int, settings: TextSettings, splits: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Return what lm-eval's settings of all texts with a ``prompt`` have; rows by split."""

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {split: Dataset.from_list(rows) for split, rows in splits.items()}

    return {
        "task": name,
        "custom_dataset": load,
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "metadata": {"version": VERSION, "length": length, "seed": settings.seed},
    }
