"""The interval of a score, and the score that guessing would reach."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from scipy.stats import binomtest

LEVEL = 0.95
_DEVIATIONS = 1.959964  # standard errors on each side of a normal mean that hold LEVEL of it


def score_interval(
    score: float, error: float | None, documents: int | None, *, averaged: bool
) -> tuple[float, float] | None:
    """Return a score's 95 % interval; None where its uncertainty is not known.

    It is Wilson's binomial one where the score is a share of ``documents`` right answers, which
    does not vanish where all or none are right; elsewhere 1.96 standard ``error`` on each side.
    ``averaged``: the score is the mean of a value per document.
    """
    if averaged and documents and 0 <= score <= 1:
        # The variance of numbers in 0 to 1 is as large as this only where all are 0 or 1.
        most = score * (1 - score)
        found = (error or 0.0) ** 2 * (documents - 1)
        if math.isclose(found, most, rel_tol=1e-6, abs_tol=1e-12):
            ends = binomtest(round(score * documents), documents).proportion_ci(LEVEL, "wilson")
            return float(ends.low), float(ends.high)
    if not error or not math.isfinite(error):
        return None
    return score - _DEVIATIONS * error, score + _DEVIATIONS * error


def averaged_metrics(task: Any) -> set[str]:
    """Return the metrics of an lm-eval task that are means of a value per document."""
    from lm_eval.api.metrics import mean

    return {name for name, how in task.aggregation().items() if how is mean}


def chance_level(task: Any, limit: int | None) -> float | None:
    """Return the accuracy of guessing evenly among each document's choices.

    The documents are those that are scored, the first ``limit``. None where a task of lm-eval has
    no choices.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or not hasattr(task, "doc_to_choice"):
        return None
    shares = []
    for _, document in task.doc_iterator(limit=limit):
        choices, gold = task.doc_to_choice(document), task.doc_to_target(document)
        right = len(set(gold)) if isinstance(gold, Sequence) and not isinstance(gold, str) else 1
        shares.append(right / len(choices))
    return math.fsum(shares) / len(shares) if shares else None


def chance_of_group(
    name: str,
    subtasks: Mapping[str, Sequence[str]],
    chances: Mapping[str, float | None],
    documents: Mapping[str, int],
) -> float | None:
    """Return the chance level of a task, or of a group: its tasks' mean, weighted by documents."""
    if name in chances:
        return chances[name]
    leaves = leaves_of(name, subtasks)
    levels = [chances.get(leaf) for leaf in leaves]
    known = [level for level in levels if level is not None]
    if not known or len(known) < len(levels):
        return None
    sizes = [documents[leaf] for leaf in leaves]
    return math.fsum(c * n for c, n in zip(known, sizes, strict=True)) / sum(sizes)


def leaves_of(name: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group and of the groups in it, in order; a task's own name."""
    if name not in subtasks or not subtasks[name]:
        return [name]
    return [leaf for part in subtasks[name] for leaf in leaves_of(part, subtasks)]
