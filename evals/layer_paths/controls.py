"""Tell what a search over layer paths shows beyond luck.

With the answer as reward a search knows the answer: 200 guesses among four choices contain the
right one almost surely. So every figure comes with what the same number of other trials reaches:
random paths of the same lengths, and the unchanged model with noise in its weights; with how often
wrong answers are "found"; and with the score of the path that one half of the questions chose, on
the other half.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from evals.layer_paths.questions import probabilities
from pretrain.model.language_model import LanguageModel

Scores = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]

_SAMPLES = 2000  # of the bootstrap
_LEVEL = 0.95


class Asked(Protocol):
    """Questions with choices, such as :class:`evals.layer_paths.questions.Questions`."""

    gold: np.ndarray[Any, np.dtype[np.int64]]
    num_choices: list[int]

    def __len__(self) -> int:
        """Return their number."""

    def scores(self, *, prior: bool) -> Scores:
        """Return what the model as it is now gives each choice, ``[S, choices]``."""


@dataclass
class Trials:
    """Trials of one kind: what each gives the choices of each question."""

    names: list[str]
    scores: list[Scores]
    """``[S, choices]`` of each trial."""

    def answers(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the choice of each trial for each question, ``[trials, S]``."""
        return np.stack([score.argmax(-1) for score in self.scores])


@dataclass
class Finding:
    """Hold what trials of one kind have found."""

    found: float
    """Share of the wrong answers of the unchanged model for which some trial is right."""
    found_wrong: float | None
    """How often some trial gives another wrong answer, by which luck is told."""
    beyond_luck: float | None
    beyond_luck_interval: Interval | None
    chosen: str
    """The trial that is best on the half that is searched on."""
    searched: float
    held_out: float
    """Its accuracy on both halves."""
    gain: float
    gain_interval: Interval
    """Over the unchanged model, on the half that chose nothing."""


def judge(
    trials: Trials,
    unchanged: Scores,
    gold: np.ndarray[Any, np.dtype[np.int64]],
    num_choices: Sequence[int],
    searched: np.ndarray[Any, np.dtype[np.bool_]],
    seed: int = 0,
) -> Finding:
    """Judge trials by all questions; ``searched`` ``[S]`` marks those that chose.

    Intervals are of a bootstrap over questions, at 95 %.
    """
    draw = np.random.default_rng(seed)
    answers, before = trials.answers(), unchanged.argmax(-1)
    given = [set(answers[:, s].tolist()) for s in range(len(gold))]
    right, wrong = np.full(len(gold), np.nan), np.full(len(gold), np.nan)
    for s, answer in enumerate(gold):
        if before[s] != answer:
            right[s] = answer in given[s]
        others = [c for c in range(num_choices[s]) if c not in (before[s], answer)]
        if others:
            wrong[s] = np.mean([c in given[s] for c in others])
    rewards = [_reward(score, gold)[searched].mean() for score in trials.scores]
    best = int(np.argmax(rewards))
    chosen, correct = answers[best] == gold, before == gold
    gains = (chosen.astype(float) - correct)[~searched]
    resampled = [draw.choice(gains, len(gains)).mean() for _ in range(_SAMPLES)]
    comparable = not np.isnan(wrong).all() and not np.isnan(right).all()
    return Finding(
        found=_mean(right),
        found_wrong=_mean(wrong) if comparable else None,
        beyond_luck=_mean(right) - _mean(wrong) if comparable else None,
        beyond_luck_interval=_difference(right, wrong, draw) if comparable else None,
        chosen=trials.names[best],
        searched=float(chosen[searched].mean()),
        held_out=float(chosen[~searched].mean()),
        gain=float(gains.mean()),
        gain_interval=_ends(resampled),
    )


def reward(
    scores: Scores,
    gold: np.ndarray[Any, np.dtype[np.int64]],
    searched: np.ndarray[Any, np.dtype[np.bool_]],
) -> float:
    """Return the mean share that the answer has among the choices of the questions searched on."""
    return float(_reward(scores, gold)[searched].mean())


@contextmanager
def noise(model: LanguageModel, scale: float, seed: int) -> Iterator[None]:
    """Add noise to the blocks' matrices, ``scale`` times their root mean square, for a while."""
    matrices = [p for block in model.blocks for p in block.parameters() if p.ndim >= 2]
    kept = [p.detach().clone() for p in matrices]
    generator = torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for p in matrices:
                drawn = torch.randn(p.shape, generator=generator, dtype=torch.float32)
                p.add_(drawn.to(p) * scale * p.float().square().mean().sqrt().to(p))
        yield
    finally:
        with torch.no_grad():
            for p, old in zip(matrices, kept, strict=True):
                p.copy_(old)


def _reward(scores: Scores, gold: np.ndarray[Any, np.dtype[np.int64]]) -> Scores:
    return probabilities(scores)[np.arange(len(gold)), gold]


def _mean(values: Scores) -> float:
    """Return the mean of what is known; 0 where nothing is: no wrong answer was to be mended."""
    return 0.0 if np.isnan(values).all() else float(np.nanmean(values))


def _difference(a: Scores, b: Scores, draw: np.random.Generator) -> Interval:
    found = []
    for _ in range(_SAMPLES):
        rows = draw.integers(len(a), size=len(a))
        if not (np.isnan(a[rows]).all() or np.isnan(b[rows]).all()):
            found.append(float(np.nanmean(a[rows]) - np.nanmean(b[rows])))
    return _ends(found)


def _ends(values: Sequence[float]) -> Interval:
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)
