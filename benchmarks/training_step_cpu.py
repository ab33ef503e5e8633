"""Time the training step against a bare torch loop over the same model, and the loader's share.

    python benchmarks/training_step_cpu.py configs/runs/demo.yaml [key=value ...]

Both train the same model on the same batches, alternating within one run, so that other work on the
machine affects both. The bare loop is forward, backward, clip, torch.optim.AdamW, and prepared
batches. The project's step loads its batches, runs through megatron-core's schedule, data parallel
and distributed optimizer, and checks the loss.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from pretrain.config import load_run_config
from pretrain.data.batches import Batch, TrainingBatches, open_data
from pretrain.model.build import build_model, padded_vocab_size
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes
from pretrain.training.engine import Engine


class BareLoop:
    """Train as one would with only the model from this project."""

    def __init__(self, model: LanguageModel, lr: float, weight_decay: float):
        self.model = model
        decayed = [p for p in model.parameters() if getattr(p, "decay", False)]
        rest = [p for p in model.parameters() if not getattr(p, "decay", False)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)

    def step(self, batches: list[Batch]) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            losses = self.model(batch.tokens, batch.targets, sequences=batch.sequences)
            loss = losses.mean() / len(batches)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    config = load_run_config(arguments.config, arguments.overrides)
    start_processes()
    data = open_data(config.data)
    vocab_size = padded_vocab_size(config.model, data.tokenizer.vocab_size)
    loader = TrainingBatches(data, config.train, config.parallel.micro_batch_size, config.seed)
    engine = Engine(build_model(config.model, vocab_size, seed=0), config.optimizer)
    bare = BareLoop(
        build_model(config.model, vocab_size, seed=0),
        config.optimizer.lr,
        config.optimizer.weight_decay,
    )

    ours, plain, loading = [], [], []
    for step in range(arguments.steps + 3):
        prepared = loader.micro_batches(step)
        for kind in ("ours", "plain") if step % 2 else ("plain", "ours"):
            start = time.perf_counter()
            if kind == "ours":
                batches = loader.micro_batches(step)
                loaded = time.perf_counter()
                engine.train_step(batches, config.optimizer.lr)
                ours.append(time.perf_counter() - start)
                loading.append(loaded - start)
            else:
                bare.step(prepared)
                plain.append(time.perf_counter() - start)
    tokens = config.train.global_batch_tokens
    mean_ours, mean_plain = (statistics.median(x[3:]) for x in (ours, plain))
    share = sum(loading[3:]) / sum(ours[3:])
    print(
        f"{config.name}: {tokens} tokens per step, {arguments.steps} steps each, medians, "
        f"{torch.get_num_threads()} threads"
    )
    print(f"bare torch loop   {tokens / mean_plain:>9,.0f} tokens/s")
    print(
        f"training step     {tokens / mean_ours:>9,.0f} tokens/s   "
        f"ratio {mean_plain / mean_ours:.3f} (target 0.95)"
    )
    print(f"loader's share    {share:>9.2%} of the step (target 1 %)")


if __name__ == "__main__":
    main()
