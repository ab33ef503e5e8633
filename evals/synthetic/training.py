"""Train one model on one synthetic task, and test it on rows up to four times as long."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from evals.synthetic.tasks import MQAR_KEYS, TASKS, make_rows
from pretrain.common.config_loader import Config, ConfigError, build_config, setting
from pretrain.config import ModelConfig
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.model.language_model import LanguageModel

TEST_FACTORS = (1, 2, 4)
LAST = 8  # positions at the end of a row that are reported separately


@dataclass
class SyntheticConfig(Config):
    """One model on one synthetic task."""

    pattern: str
    """The mixers of all blocks, as in ``model.pattern``."""
    task: Literal[
        "s3",
        "s4",
        "a5",
        "s5",
        "z60",
        "parity",
        "modular_addition",
        "modular_arithmetic",
        "copying",
        "induction",
        "mqar",
    ] = setting()
    """Name of the task."""
    mixers: dict[str, Any] = field(default_factory=dict)
    """Settings of mixers, as in ``model.mixers``."""
    hidden_size: int = setting(64, minimum=1)
    """The model's width."""
    mlp: Literal["none", "swiglu", "gelu"] = setting("none")
    """The feed-forward network of every block."""
    init_std: float = setting(0.02, above=0)
    """Standard deviation of the Gaussian that matrices are initialised with."""
    length: int = setting(32, minimum=4)
    """Tokens of a training row, what opens it included."""
    curriculum: list[int] = field(default_factory=list)
    """Shorter lengths trained on first, each for as many steps as ``length`` itself."""
    tokens_per_pair: int = setting(8, minimum=4)
    """Tokens of a row for each pair of ``mqar``, at every length."""
    batch_size: int = setting(128, minimum=1)
    """Rows of a step."""
    steps: int = setting(1000, minimum=1)
    """Optimizer steps."""
    lr: float = setting(2e-3, above=0)
    """Peak learning rate, from which it falls to 0 as a cosine."""
    warmup: float = setting(0.05, minimum=0, maximum=1)
    """Share of the steps in which the learning rate grows."""
    weight_decay: float = setting(0.01, minimum=0)
    """AdamW's weight decay."""
    clip_grad: float = setting(1.0, above=0)
    """Largest global norm of the gradient."""
    test_rows: int = setting(512, minimum=1)
    """Rows to score at each of 1, 2 and 4 times ``length``."""
    seed: int = setting(0, minimum=0)
    """Seed of the model and of the rows."""

    def model(self, where: str = "config") -> ModelConfig:
        """Return the model's settings; alphabets differ, so embeddings are not tied."""
        values = {
            "pattern": self.pattern,
            "hidden_size": self.hidden_size,
            "mixers": self.mixers,
            "mlp": {"kind": self.mlp},
            "tie_embeddings": False,
            "init_std": self.init_std,
        }
        return build_config(ModelConfig, values, where)


def check_config(config: SyntheticConfig, where: str) -> None:
    """Check settings that depend on each other; raises ConfigError naming the field."""
    config.model(where)
    for length in config.curriculum:
        if not 4 <= length <= config.length:
            raise ConfigError(
                f"{where}: curriculum names the length {length}, expected 4 to length = "
                f"{config.length}"
            )
    if config.steps <= len(config.curriculum):
        raise ConfigError(
            f"{where}: steps is {config.steps}, expected more than the {len(config.curriculum)} "
            "lengths of the curriculum"
        )
    if config.task == "mqar":
        for length in (config.length, *config.curriculum):
            if length % 2 or length < config.tokens_per_pair:
                raise ConfigError(
                    f"{where}: a length of mqar is {length}, expected an even number, at least "
                    f"tokens_per_pair = {config.tokens_per_pair}"
                )
        pairs = TEST_FACTORS[-1] * config.length // config.tokens_per_pair
        if pairs > MQAR_KEYS:
            raise ConfigError(
                f"{where}: tokens_per_pair is {config.tokens_per_pair}, which makes {pairs} pairs "
                f"at {TEST_FACTORS[-1]} times the length, expected at most {MQAR_KEYS}"
            )


def train_length(config: SyntheticConfig, step: int) -> int:
    """Return the length of the rows of a step: the curriculum's in turn, then ``length``."""
    lengths = [*config.curriculum, config.length]
    return lengths[step * len(lengths) // config.steps]


def learning_rate(config: SyntheticConfig, step: int) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to 0."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def run(
    config: SyntheticConfig, on_step: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train and test a model; ``on_step`` is called with each step and its loss.

    Process groups must exist. Returns the settings, the scores, and what else is needed to repeat
    the run.
    """
    torch.set_num_threads(1)
    vocab_size, started = TASKS[config.task].vocab_size, time.perf_counter()
    model = build_model(config.model(), vocab_size, seed=config.seed)
    losses = train(model, config, on_step)
    during_training = model.metrics()
    minutes = (time.perf_counter() - started) / 60
    return {
        "settings": asdict(config),
        "parameters": count_model(config.model(), vocab_size, config.length).parameters,
        "chance": TASKS[config.task].chance,
        "final_loss": float(np.mean(losses[-20:])),
        "losses": [round(float(loss), 5) for loss in losses],
        "tests": [test(model, config, factor * config.length) for factor in TEST_FACTORS],
        "mixer_metrics": {"training": during_training, "tests": model.metrics()},
        "minutes": round(minutes, 2),
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
) -> list[float]:
    """Train a model and return the loss of every step, in nats per scored target."""
    parameters = list(model.parameters())
    decayed = [p for p in parameters if getattr(p, "decay", False)]
    rest = [p for p in parameters if not getattr(p, "decay", False)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    model.train()
    losses = []
    for step in range(config.steps):
        rows = make_rows(
            config.task,
            seed=config.seed,
            stream="train",
            index=step,
            rows=config.batch_size,
            length=train_length(config, step),
            tokens_per_pair=config.tokens_per_pair,
        )
        tokens, targets = torch.from_numpy(rows.tokens), torch.from_numpy(rows.targets)
        loss = model(tokens, targets)[torch.from_numpy(rows.scored)].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    return losses


@torch.no_grad()
def test(model: LanguageModel, config: SyntheticConfig, length: int) -> dict[str, Any]:
    """Measure the accuracy on rows of ``length`` that no training step has seen.

    accuracy: share of scored targets that are right; rows: share of rows in which all are; last:
    accuracy on the last positions of the rows; by_position: at each position, null where nothing
    is scored.
    """
    model.eval()
    rows = make_rows(
        config.task,
        seed=config.seed,
        stream="test",
        index=length,
        rows=config.test_rows,
        length=length,
        tokens_per_pair=config.tokens_per_pair,
    )
    parts = [
        model(part).argmax(-1) for part in torch.from_numpy(rows.tokens).split(config.batch_size)
    ]
    right = (torch.cat(parts).numpy() == rows.targets) & rows.scored
    counts, hits = rows.scored.sum(0), right.sum(0)
    return {
        "length": length,
        "accuracy": _share(hits.sum(), counts.sum()),
        "rows": float((right == rows.scored).all(1).mean()),
        "last": _share(hits[-LAST:].sum(), counts[-LAST:].sum()),
        "by_position": [_share(hit, count) for hit, count in zip(hits, counts, strict=True)],
    }


def _share(hits: int, count: int) -> float | None:
    return round(float(hits / count), 5) if count else None
