"""The scores of a run's evaluations, those of different settings kept apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals.held_out import TRAINING_WINDOWS
from pretrain.run_directory import RunDirectory

# What a score depends on besides the model, as results say it: shown where results differ in it.
_SETTINGS = (
    *("num_fewshot", "max_length", "bos_rule", "precision", "recurrences", "weights", "version"),
    *("window", "stride", "carry_state", "data", "seed"),
)
# What makes a score one of a part of its documents: always shown.
_LIMITS = {"limit": "documents", "max_tokens": "tokens"}


@dataclass(frozen=True)
class Score:
    """One number of an evaluation of the checkpoint at ``step``.

    ``limits`` says which part of the documents was scored, () for all; ``settings`` are those of
    the evaluation; ``chance`` is what guessing reaches, None where that is not known.
    """

    task: str
    metric: str
    value: float
    step: int
    limits: tuple[str, ...]
    settings: tuple[tuple[str, Any], ...]
    chance: float | None

    @property
    def kind(self) -> tuple[Any, ...]:
        """Return what is equal for scores that can be compared."""
        return self.task, self.metric, self.limits, self.settings


def read_scores(directory: RunDirectory) -> list[Score]:
    """Return the score of the latest step of each kind of evaluation of a run.

    That is bits per byte for perplexity, numbers named accuracy or score for others, and the first
    score of lm-eval's tasks (normalized by length if there is such a score).
    """
    found: dict[tuple[Any, ...], Score] = {}
    for path in sorted(directory.evals.rglob("*.json")):
        for score in _scores_of(path):
            if score.kind not in found or score.step >= found[score.kind].step:
                found[score.kind] = score
    return list(found.values())


def _scores_of(path: Path) -> list[Score]:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    if not isinstance(result, dict):
        return []
    listed = result.get("scores")
    scores = listed if isinstance(listed, dict) else result
    wanted = [k for k in ("bits_per_byte", "accuracy", "score") if k in scores]
    if scores is listed and listed:
        wanted = ["acc_norm" if "acc_norm" in listed else next(iter(listed))]
    chances = result.get("chance")
    return [
        Score(
            str(result.get("task", path.stem)),
            key,
            float(scores[key]),
            int(result.get("step", 0)),
            _limits(result),
            tuple((name, _plain(result.get(name))) for name in _SETTINGS),
            chances.get(key) if isinstance(chances, dict) else None,
        )
        for key in wanted
        if isinstance(scores[key], int | float)
    ]


def _limits(result: dict[str, Any]) -> tuple[str, ...]:
    documents, errors = result.get("documents_of_task") or 0, result.get("stderr")
    whole = {  # where the limit was above what there is
        "limit": 0 < documents < (result.get("limit") or 0),
        "max_tokens": isinstance(errors, dict) and errors.get("nats_per_token") is None,
    }
    found = []
    for name, unit in _LIMITS.items():
        limit = result.get(name)
        if limit is not None and not whole[name]:
            found.append(f"{limit:,} {unit}" if isinstance(limit, int) else f"{limit} {unit}")
    if result.get("windows") == TRAINING_WINDOWS:
        found.append("the windows of validation in training")
    return tuple(found)


def _plain(value: Any) -> Any:
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def score_names(scores: Sequence[Score]) -> dict[tuple[Any, ...], str]:
    """Return a name for each kind among ``scores``.

    It has the task, the metric, the part that was scored, what tells it apart, and the chance level
    where that is the same for all.
    """
    names = {}
    for score in scores:
        alike = [s for s in scores if (s.task, s.metric) == (score.task, score.metric)]
        differing = [
            f"{name.replace('_', ' ')} {value}"
            for index, (name, value) in enumerate(score.settings)
            if len({s.settings[index][1] for s in alike}) > 1
        ]
        chances = {s.chance for s in alike if s.kind == score.kind}
        guessing = [f"chance {c:.4f}" for c in chances if c is not None and len(chances) == 1]
        about = [*(f"only {part}" for part in score.limits), *differing, *guessing]
        name = f"{score.task} {score.metric.replace('_', ' ')}"
        names[score.kind] = f"{name} ({'; '.join(about)})" if about else name
    return dict(sorted(names.items(), key=lambda item: item[1]))
