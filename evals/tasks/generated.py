"""Generated tasks in lm-eval's form: ``NAME`` or ``NAME@LENGTH``.

LENGTH of a long-context task is in tokens, including the answer's (default: the longest request
that the evaluation allows), of the others in elements, digits, words or pairs. Long-context tasks
are scored as in RULER, by the share of the answers that the text contains, ignoring case.
"""

from __future__ import annotations

from typing import Any

from evals.synthetic.long_context import LONG_TASKS, make_texts
from evals.synthetic.text_problems import DEFAULT_LENGTH, PROBLEMS, make_problems
from evals.tasks.family import (
    TaskFamily,
    TextSettings,
    parse_name,
    share_of_answers,
    shared_settings,
)
from pretrain.common.errors import UserError


def generated_config(name: str, settings: TextSettings) -> dict[str, Any]:
    """Return lm-eval's settings of a task; raises UserError for too small or large a length."""
    task, length = parse_name(name)
    if task in LONG_TASKS:
        length = length or settings.max_length
        if length > settings.max_length:
            raise UserError(
                f"task '{name}' has texts of {length:,} tokens, but requests are cut to "
                f"{settings.max_length:,}: give {settings.length_option}{length}"
            )
        return _long_config(name, task, length, settings)
    return _problem_config(name, task, length or DEFAULT_LENGTH, settings)


def _long_config(name: str, task: str, length: int, settings: TextSettings) -> dict[str, Any]:
    try:
        texts = make_texts(
            task, count=settings.count, length=length, tokens=settings.tokens, seed=settings.seed
        )
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = [{"prompt": text.prompt, "answers": text.answers} for text in texts]
    return {
        **shared_settings(name, length, settings, {"test": rows}),
        "output_type": "generate_until",
        "num_fewshot": 0,
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {
            "until": ["\n\n"],
            "max_gen_toks": LONG_TASKS[task].max_tokens,
            "do_sample": False,
        },
        "process_results": share_of_answers,
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
    }


def _problem_config(name: str, task: str, length: int, settings: TextSettings) -> dict[str, Any]:
    splits: dict[str, list[dict[str, Any]]] = {}
    for stream, count in (("test", settings.count), ("train", 64)):  # examples for prompts
        try:
            problems = make_problems(
                task, count=count, length=length, seed=settings.seed, stream=stream
            )
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
        splits[stream] = [
            {
                "prompt": p.prompt,
                "answers": [p.answer],
                "choices": p.choices,
                "gold": p.gold if p.choices else 0,
            }
            for p in problems
        ]
    common = {**shared_settings(name, length, settings, splits), "fewshot_split": "train"}
    if splits["test"][0]["choices"]:
        return {
            **common,
            "output_type": "multiple_choice",
            "doc_to_target": "{{gold}}",
            "doc_to_choice": "{{choices}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return {
        **common,
        "output_type": "generate_until",
        "doc_to_target": "{{answers[0]}}",
        "generation_kwargs": {
            "until": ["\n"],
            "max_gen_toks": 16 + 4 * len(splits["test"][0]["answers"][0].split()),
            "do_sample": False,
        },
        "process_results": share_of_answers,
        "metric_list": [{"metric": "contains", "aggregation": "mean", "higher_is_better": True}],
    }


FAMILIES = (
    TaskFamily("long contexts, after RULER (NAME@TOKENS)", tuple(LONG_TASKS), generated_config),
    TaskFamily(
        "state tracking, recall, copying (NAME@ELEMENTS)", tuple(PROBLEMS), generated_config
    ),
)
