"""Tasks of lm-evaluation-harness on a model, in this process or on all training processes alike."""

from __future__ import annotations

import importlib.metadata
import random
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

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
    """The result of each task and group by name, as it goes into a file.

    model: an ``lm_eval.api.model.LM``; tasks: of :func:`evals.tasks.loading.load_tasks`;
    limit: documents of each task, the first ones; num_fewshot: examples in a prompt, null as the
    task has it (0 where it says nothing); bootstrap_samples: for standard errors of metrics
    without a formula, 0 for no standard errors at all.
    Random numbers of this process are left as they were.
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
        except (AssertionError, ValueError) as error:  # as lm-eval says what it does not take
            inside = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
            if inside & {"loglikelihood", "loglikelihood_rolling", "generate_until"}:
                raise  # the model's own
            said = str(error).strip().splitlines() or [type(error).__name__]
            names = ", ".join(tasks["tasks"])
            raise UserError(f"lm-eval refused {names}: {said[0]}") from error
    cut = getattr(model, "cut", None)
    common = {
        "limit": limit,
        "fewshot_seed": FEWSHOT_SEED,
        "cut_requests": cut,
        "lm_eval": importlib.metadata.version("lm_eval"),
    }
    results = {}
    for name, metrics in found["results"].items():
        own = found.get("group_subtasks", {}).get(name)
        results[name] = {
            "task": name,
            **_scores(metrics),
            "version": found["versions"].get(name),
            "num_fewshot": found["n-shot"].get(name),
            "documents": found["n-samples"].get(name, {}).get("effective"),
            **({"subtasks": own} if own else {}),
            **common,
        }
    return results


def set_examples(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """How many examples a prompt has, of all tasks. Raises UserError where one takes none."""
    for name, task in tasks["tasks"].items():
        own = task.get_config("num_fewshot")
        if num_fewshot is not None and own != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        elif num_fewshot and own == 0:
            raise UserError(
                f"task '{name}' is defined without examples, but {num_fewshot} are asked for "
                "(num_fewshot)"
            )
        elif own is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)


def _scores(metrics: dict[str, Any]) -> dict[str, Any]:
    """``scores`` and ``stderr`` by metric; the filter is part of the name where there is one."""
    scores: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in metrics.items():
        metric, comma, kind = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        into = errors if metric.endswith("_stderr") else scores
        metric = metric.removesuffix("_stderr")
        into[metric if kind in ("none", "remove_whitespace") else f"{metric}, {kind}"] = value
    return {"scores": scores, "stderr": errors}


@contextmanager
def seeded() -> Iterator[None]:
    """Random numbers inside are the same every time and on every process, and of no consequence
    outside."""
    with random_numbers_kept():
        random.seed(FEWSHOT_SEED)
        np.random.seed(FEWSHOT_SEED)
        yield


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """What is drawn inside does not change what is drawn after."""
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
