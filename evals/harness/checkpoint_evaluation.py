"""Evaluate a run's checkpoint on lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from evals.harness.evaluation import evaluate_tasks, seeded, set_examples
from evals.harness.imported_model import ImportedHarnessModel
from evals.harness.model import HarnessModel
from evals.tasks.loading import load_tasks
from pretrain.inference.load import LoadedModel
from pretrain.inference.score import StateScorer


def harness_model(
    loaded: LoadedModel,
    *,
    bos: str = "document",
    max_length: int | None = None,
    tokens_per_pass: int = 8192,
) -> HarnessModel:
    """Return a loaded model behind lm-eval's interface; settings as :func:`evaluate_checkpoint`."""
    scorer = StateScorer(loaded.reader, loaded.candidates, tokens_per_pass=tokens_per_pass)
    length = max_length or loaded.run.train.seq_len
    if bos == "model":
        return ImportedHarnessModel(scorer, loaded, length)
    return HarnessModel(scorer, loaded.tokenizer, length, bos=bos)


def evaluate_checkpoint(
    loaded: LoadedModel,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    bos: str = "document",
    max_length: int | None = None,
    tokens_per_pass: int = 8192,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each task's name and result, with every setting that it depends on, when it is done.

    ``max_length`` defaults to the training length; ``bos`` is ``document``, ``none`` or, for an
    imported model, ``model``: as its own tokenizer has it. Raises UserError, before the first task,
    for tasks that cannot be evaluated with these settings.
    """
    model = harness_model(loaded, bos=bos, max_length=max_length, tokens_per_pass=tokens_per_pass)
    with seeded():
        loaded_tasks = [load_tasks([name], model.text_settings(limit)) for name in names]
    for tasks in loaded_tasks:
        set_examples(tasks, num_fewshot)
        for name, task in tasks["tasks"].items():
            model.check_task(name, task, sampled=True)
    about = {
        **model.settings(),
        "checkpoint": str(loaded.checkpoint),
        "step": loaded.state.step,
        "tokens_trained": loaded.state.tokens,
        "precision": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
    }
    for tasks in loaded_tasks:
        model.cut = 0
        results = evaluate_tasks(model, tasks, limit=limit, num_fewshot=num_fewshot)
        if loaded.exits is not None:
            about["depth"] = loaded.exits.take_summary()
        yield from ((name, {**result, **about}) for name, result in results.items())
