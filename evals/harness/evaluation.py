"""Evaluate a model on tasks of lm-evaluation-harness, in one process or on all training ranks."""

from __future__ import annotations

import importlib.metadata
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from evals.harness.scores import (
    averaged_metrics,
    chance_level,
    chance_of_group,
    leaves_of,
    score_interval,
)
from pretrain.common.errors import UserError

FEWSHOT_SEED = 1234  # lm-eval's own


def evaluate_tasks(
    model: Any,
    tasks: dict[str, Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bootstrap_samples: int = 1000,
) -> dict[str, dict[str, Any]]:
    """Return the result of each task and group by name, as it is written to a file.

    ``model`` is an ``lm_eval.api.model.LM``; ``tasks`` come from
    :func:`evals.tasks.loading.load_tasks`; ``limit`` is the number of documents per task, the first
    ones; ``num_fewshot`` the examples per prompt, None for the task's own (0 where it has none);
    ``bootstrap_samples`` serve standard errors of metrics without a formula, 0 for no standard
    errors at all. The state of random number generators is restored. Raises UserError where
    lm-eval refuses a task.
    """
    from lm_eval.evaluator import evaluate

    set_examples(tasks, num_fewshot)
    with seeded():
        try:
            found = evaluate(
                lm=model,
                task_dict=tasks,
                limit=limit,
                bootstrap_iters=bootstrap_samples,
                log_samples=False,
            )
        except (AssertionError, ValueError) as error:  # lm-eval's way of refusing settings
            inside = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if inside & {"loglikelihood", "loglikelihood_rolling", "generate_until"}:
                raise  # an error of the model
            lines = str(error).strip().splitlines() or [type(error).__name__]
            names = ", ".join(tasks["tasks"])
            raise UserError(f"lm-eval refused {names}: {lines[0]}") from error
    cut = getattr(model, "cut", None)
    common = {
        "limit": limit,
        "fewshot_seed": FEWSHOT_SEED,
        "cut_requests": cut,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    groups, sizes = found.get("group_subtasks", {}), found["n-samples"]
    chances = {name: chance_level(task, limit) for name, task in tasks["tasks"].items()}
    scored = {name: size["effective"] for name, size in sizes.items()}
    results = {}
    for name, metrics in found["results"].items():
        leaves = leaves_of(name, groups)
        scores, errors = _scores(metrics)
        documents = sum(scored[leaf] for leaf in leaves if leaf in scored) or None
        averaged = averaged_metrics(tasks["tasks"][name]) if name in tasks["tasks"] else set()
        chance = chance_of_group(name, groups, chances, scored)
        results[name] = {
            "task": name,
            "scores": scores,
            "stderr": errors,
            "intervals": {
                metric: score_interval(
                    score, errors.get(metric), documents, averaged=metric.split(",")[0] in averaged
                )
                for metric, score in scores.items()
                if bootstrap_samples
            },
            "chance": {m: chance for m in scores if chance is not None and m.startswith("acc")},
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "documents": documents,
            # Of these, the first ones were scored where there is a limit.
            "documents_of_task": sum(sizes[leaf]["original"] for leaf in leaves if leaf in sizes),
            **({"subtasks": groups[name]} if groups.get(name) else {}),
            **common,
        }
    return results


def set_examples(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """Set the number of examples per prompt of all tasks; raises UserError where one takes none."""
    for name, task in tasks["tasks"].items():
        default = task.get_config("num_fewshot")
        if num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif num_fewshot and default == 0:
            raise UserError(
                f"task '{name}' is defined without examples, but {num_fewshot} are asked for "
                "(num_fewshot)"
            )
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _scores(metrics: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """Return scores and standard errors by metric; a metric's name includes its filter."""
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        into = errors if metric.endswith("_stderr") else scores
        metric = metric.removesuffix("_stderr")
        into[metric if kind in ("none", "remove_whitespace") else f"{metric}, {kind}"] = value
    return scores, errors


@contextmanager
def seeded() -> Iterator[None]:
    """Seed random numbers equally every time and on every rank, and restore them afterwards."""
    with random_state_restored():
        random.seed(FEWSHOT_SEED)
        np.random.seed(FEWSHOT_SEED)
        yield


@contextmanager
def random_state_restored() -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's random numbers afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    cpu = torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if devices:
            torch.cuda.set_rng_state_all(devices)
