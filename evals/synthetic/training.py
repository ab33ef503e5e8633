"""Train one model on one synthetic task, and test it on rows up to four times as long."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from evals.synthetic.rows import Rows
from evals.synthetic.settings import SyntheticConfig
from evals.synthetic.tasks import TASKS, make_rows
from evals.synthetic.windows import Windows
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.model.language_model import LanguageModel

LAST = 8  # positions at the end of a row that are reported separately


def train_length(config: SyntheticConfig, step: int) -> int:
    """Return the length of the rows of a step: the curriculum's in turn, then ``length``."""
    lengths = [*config.curriculum, config.length]
    return lengths[step * len(lengths) // config.steps]


def learning_rate(config: SyntheticConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, constant, then down to 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    falling = max(1, round(config.decay_share * (config.steps - warmup)))
    progress = max(0, step - config.steps + falling) / falling
    if config.decay == "none":
        return config.lr
    if config.decay == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def run(
    config: SyntheticConfig, on_step: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train and test a model; ``on_step`` is called with each step and its loss.

    Process groups must exist. Returns the settings, the scores, and what else is needed to repeat
    the run; ``minutes`` are of this process's CPU time in training.
    """
    torch.set_num_threads(1)
    vocab_size, started = TASKS[config.task].vocab_size, time.process_time()
    model = build_model(config.model(), vocab_size, seed=config.seed)
    windows = Windows(config) if config.task == "n_parity" else None
    losses = train(model, config, on_step, windows)
    during_training = model.metrics()
    minutes = (time.process_time() - started) / 60
    return {
        "settings": asdict(config),
        "parameters": count_model(config.model(), vocab_size, config.length).parameters,
        "chance": TASKS[config.task].chance,
        "finished": len(losses) == config.steps,
        "final_loss": float(np.mean(losses[-20:])),
        "losses": [round(float(loss), 5) for loss in losses],
        **({} if windows is None else {"window": windows.reached}),
        "tests": tests(model, config),
        "mixer_metrics": {"training": during_training, "tests": model.metrics()},
        "minutes": round(minutes, 3),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def train(
    model: LanguageModel,
    config: SyntheticConfig,
    on_step: Callable[[int, float], None] | None = None,
    windows: Windows | None = None,
) -> list[float]:
    """Train a model and return the loss of every step, in nats per scored target.

    There are fewer losses than steps where ``config.minutes`` of CPU time were over before.
    """
    parameters = list(model.parameters())
    decayed = [p for p in parameters if getattr(p, "decay", False)]
    rest = [p for p in parameters if not getattr(p, "decay", False)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    losses: list[float] = []
    started = time.process_time()
    for step in range(config.steps):
        limit = config.minutes
        if losses and limit is not None and time.process_time() - started > 60 * limit:
            break
        rows = make_rows(
            config.task,
            seed=config.seed,
            stream="train",
            index=step,
            rows=config.batch_size,
            length=train_length(config, step) if windows is None else windows.length(step),
            options=config.options() if windows is None else config.options(windows.now),
        )
        model.begin_step(config.seed, step)
        tokens, targets = torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)
        loss = model(tokens, targets)[torch.from_numpy(rows.scored)].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        model.update_biases()
        losses.append(loss.item())
        if windows is not None:
            windows.after(model, step)
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


def tests(model: LanguageModel, config: SyntheticConfig) -> list[dict[str, Any]]:
    """Test a model at every length, and with every number of passes of its loop."""
    scores = []
    counts: list[int | None] = [*config.test_recurrences]
    for passes in counts or [None]:
        if model.recursion is not None:
            model.recursion.set_times(passes)
        for factor in config.test_factors:
            score = test(model, config, factor * config.length)
            scores.append(score if passes is None else {**score, "passes": passes})
    if model.recursion is not None:
        model.recursion.set_times(None)
    return scores


@torch.no_grad()
def test(model: LanguageModel, config: SyntheticConfig, length: int) -> dict[str, Any]:
    """Measure accuracy and loss on rows of ``length`` that no training step has seen.

    accuracy: share of scored targets that are right; rows: share of rows in which all are; last:
    accuracy on the last positions of the rows; loss, tail_loss over the last quarter of the row,
    and end_loss over as many positions at its end as a quarter of a training row has, in nats;
    by_position: accuracy at each position, null where nothing is scored.
    """
    model.eval()
    rows = _test_rows(config, length)
    found, losses = [], []
    at_once = max(1, config.batch_size * config.length // rows.tokens.shape[1])
    for part, targets in zip(
        torch.from_numpy(rows.tokens).split(at_once),
        torch.from_numpy(rows.targets).split(at_once),
        strict=True,
    ):
        logits = model(part)
        found.append(logits.argmax(-1))
        losses.append(cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none"))
    right = (torch.cat(found).numpy() == rows.targets) & rows.scored
    lost = np.where(rows.scored, torch.cat(losses).numpy(), 0).sum(0)
    counts, hits = rows.scored.sum(0), right.sum(0)
    late, end = len(counts) - len(counts) // 4, len(counts) - config.length // 4
    return {
        "length": length,
        "accuracy": _share(hits.sum(), counts.sum()),
        "rows": float((right == rows.scored).all(1).mean()),
        "last": _share(hits[-LAST:].sum(), counts[-LAST:].sum()),
        "loss": _share(lost.sum(), counts.sum()),
        "tail_loss": _share(lost[late:].sum(), counts[late:].sum()),
        "end_loss": _share(lost[end:].sum(), counts[end:].sum()),
        "by_position": [_share(hit, count) for hit, count in zip(hits, counts, strict=True)],
    }


def _test_rows(config: SyntheticConfig, length: int) -> Rows:
    """Return test rows of ``length``; of text, the ends of the longest ones.

    So the last tokens are the same at every length, and what differs is their context alone.
    """
    drawn = length
    if config.task == "bytes":
        drawn = max(length, *(factor * config.length for factor in config.test_factors))
    rows = make_rows(
        config.task,
        seed=config.seed,
        stream="test",
        index=drawn,
        rows=config.test_rows,
        length=drawn,
        options=config.options(),
    )
    end = slice(drawn - length, None)
    return Rows(rows.tokens[:, end], rows.targets[:, end], rows.scored[:, end])


def _share(hits: float, count: int) -> float | None:
    return round(float(hits / count), 5) if count else None
