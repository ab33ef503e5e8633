"""Evaluate any causal model of Hugging Face on lm-eval's tasks, by lm-eval's own ``hf`` model.

No model code of ``pretrain`` is imported: what it does to run without CUDA confuses transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from evals.harness.evaluation import evaluate_tasks, seeded, set_examples
from evals.tasks.family import COUNT, TextSettings
from evals.tasks.loading import load_tasks
from pretrain.common.errors import UserError


def evaluate_hugging_face(
    source: str,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    max_length: int | None = None,
    precision: str = "float32",
    trust_remote_code: bool = False,
    batch_size: int = 8,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each task's name and result, when it is done, of the causal model ``source``.

    ``source`` is a name on the hub or a folder; ``trust_remote_code`` runs the code that comes with
    it. Raises UserError where packages are missing or the model cannot be loaded.
    """
    try:
        import torch
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(
            f"a Hugging Face model needs lm-eval and transformers ({error}): "
            "pip install 'lm-eval[hf]'"
        ) from None
    try:
        model: Any = HFLM(
            pretrained=source,
            device="cuda" if torch.cuda.is_available() else "cpu",
            trust_remote_code=trust_remote_code,
            batch_size=batch_size,
            max_length=max_length,
            dtype={"float32": "float32", "bf16": "bfloat16"}[precision],
        )
    except Exception as error:  # of transformers, of the formats that it reads, of the model's code
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"hf:{source} could not be loaded ({lines[0]})") from None
    settings = TextSettings(
        lambda text: len(model.tok_encode(text)), model.max_length, limit or COUNT
    )
    with seeded():
        loaded_tasks = [load_tasks([name], settings) for name in names]
    for tasks in loaded_tasks:
        set_examples(tasks, num_fewshot)
    about = {
        "bos_rule": "as the tokenizer has it",
        "max_length": model.max_length,
        "tokenizer_sha256": hashlib.sha256(_serialized(model.tokenizer).encode()).hexdigest(),
        "checkpoint": f"hf:{source}",
        "precision": precision,
    }
    for tasks in loaded_tasks:
        results = evaluate_tasks(model, tasks, limit=limit, num_fewshot=num_fewshot)
        yield from ((name, {**result, **about}) for name, result in results.items())


def _serialized(tokenizer: Any) -> str:
    """Return a tokenizer's file where it has one, otherwise its vocabulary, as text."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if hasattr(backend, "to_str"):
        text: str = backend.to_str()
        return text
    return json.dumps(sorted(tokenizer.get_vocab().items()))
