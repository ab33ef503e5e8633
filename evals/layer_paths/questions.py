"""Questions of a multiple-choice task, and what a model gives each choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from evals.harness.evaluation import seeded, set_examples
from evals.harness.model import HarnessModel
from evals.tasks.loading import load_tasks
from pretrain.common.errors import UserError

FEWEST = 8  # questions, half of them to search on


class Questions:
    """The first ``count`` questions of a task; ``gold`` ``[S]`` has the number of the answer."""

    gold: np.ndarray[Any, np.dtype[np.int64]]
    num_choices: list[int]

    def __init__(self, model: HarnessModel, name: str, count: int, num_fewshot: int | None = None):
        """Load the task; raises UserError where it is no multiple-choice task of single answers."""
        with seeded():
            tasks = load_tasks([name], model.text_settings(count))
            if list(tasks["tasks"]) != [name]:
                raise UserError(f"'{name}' is a group of tasks, expected one task")
            set_examples(tasks, num_fewshot)
            task = tasks["tasks"][name]
            if task.OUTPUT_TYPE != "multiple_choice":
                raise UserError(
                    f"task '{name}' is no multiple-choice task, and a search over layer paths "
                    "compares the likelihoods of choices"
                )
            task.build_all_requests(limit=count, rank=0, world_size=1)
        self._model = model
        by_question: dict[int, list[tuple[str, str]]] = {}
        for instance in sorted(task.instances, key=lambda i: (i.doc_id, i.idx)):
            choices = len(task.doc_to_choice(instance.doc))
            if instance.idx < choices:  # beyond: what other metrics of the task ask for
                by_question.setdefault(instance.doc_id, []).append(instance.args)
        documents = {instance.doc_id: instance.doc for instance in task.instances}
        gold = [task.doc_to_target(documents[number]) for number in by_question]
        if any(not isinstance(answer, int) for answer in gold):
            raise UserError(f"task '{name}' has questions with several answers, expected one each")
        if len(gold) < FEWEST:
            raise UserError(
                f"task '{name}' has {len(gold)} questions here, expected at least {FEWEST}: half "
                "of them are searched on, the others tell whether it was luck"
            )
        self.gold = np.array(gold)
        self._requests = list(by_question.values())
        self.num_choices = [len(found) for found in self._requests]
        endings = {ending for found in self._requests for _, ending in found}
        self._endings = sorted(endings)

    def __len__(self) -> int:
        return len(self.gold)

    def scores(self, *, prior: bool = True) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return each choice's log-likelihood ``[S, choices]``, -inf where there are fewer.

        With ``prior`` less that of the choice behind an empty prompt: on a path with fewer blocks a
        model favours short answers.
        """
        flat = [pair for found in self._requests for pair in found]
        alone = [("", ending) for ending in self._endings] if prior else []
        values = self._log_likelihoods([*flat, *alone])
        base = dict(zip(self._endings, values[len(flat) :], strict=True)) if prior else {}
        scores = np.full((len(self), max(self.num_choices)), -np.inf)
        given = iter(values)
        for row, found in enumerate(self._requests):
            for column, (_, ending) in enumerate(found):
                scores[row, column] = next(given) - base.get(ending, 0.0)
        return scores

    def _log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        requests = [
            Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=0) for pair in pairs
        ]
        return [value for value, _ in self._model.loglikelihood(requests)]


def probabilities(
    scores: np.ndarray[Any, np.dtype[np.float64]],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the shares ``[S, choices]`` that the choices have of each question's likelihood."""
    found = np.exp(scores - scores.max(-1, keepdims=True))
    shares: np.ndarray[Any, np.dtype[np.float64]] = found / found.sum(-1, keepdims=True)
    return shares


def divergence(
    scores: np.ndarray[Any, np.dtype[np.float64]], others: np.ndarray[Any, np.dtype[np.float64]]
) -> float:
    """Return the mean KL divergence, in nats, of two models' shares over the choices."""
    p, q = probabilities(scores), probabilities(others)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(np.maximum(q, 1e-300))), 0.0)
    return float(terms.sum(-1).mean())
