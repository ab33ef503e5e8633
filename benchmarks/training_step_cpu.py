"""Time the training step: against a bare torch loop over the same model, or against a Llama.

    python benchmarks/training_step_cpu.py configs/runs/demo.yaml [key=value ...]
    python benchmarks/training_step_cpu.py --llama attn gdn para_gru m2rnn

In either form the two sides alternate within one run, so that other work on the machine affects
both. The bare loop trains the same model on the same batches: forward, backward, clip,
torch.optim.AdamW, and prepared batches. The project's step loads its batches, runs through
megatron-core's schedule, data parallel and distributed optimizer, and checks the loss; its share of
loading is printed.

The Llama is transformers' own (SDPA), trained by a loop as above on tokens drawn at random; each
layer named after ``--llama`` is in all blocks of a model of the project's that has as many
parameters, its MLPs being narrower or wider. Printed are medians over pairs of neighbouring steps
of the time as a multiple of the Llama's, with the interval that 95 % of resampled medians lie in:
on the clock, and of this process's CPU seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, load_run_config
from pretrain.data.batch import Batch
from pretrain.data.batches import TrainingBatches, open_data, pack_rows
from pretrain.model.build import build_model, padded_vocab_size
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes
from pretrain.training.engine import Engine

WARM_UP = 3  # steps that are not counted
VOCAB, HIDDEN, LAYERS, HEADS, INNER = 8192, 256, 9, 4, 688  # of the Llama: 9.2M parameters
ROWS, SEQ_LEN = 4, 512


class BareLoop:
    """Train as one would with only the model from this project."""

    def __init__(self, model: LanguageModel, lr: float, weight_decay: float):
        self.model = model
        self.optimizer = _adamw(model, lr, weight_decay)

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


class LlamaLoop:
    """Train transformers' Llama in a bare loop."""

    def __init__(self, lr: float, weight_decay: float):
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INNER,
            max_position_embeddings=SEQ_LEN,
            tie_word_embeddings=True,
            use_cache=False,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.model: nn.Module = LlamaForCausalLM(config)
        self.optimizer = _adamw(self.model, lr, weight_decay)

    def step(self, rows: torch.Tensor) -> float:
        self.optimizer.zero_grad()
        loss = self.model(input_ids=rows, labels=rows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss.detach())


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def against_bare_loop(arguments: argparse.Namespace) -> None:
    """Print the tokens per second of both, and the share of loading batches."""
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
    for step in range(arguments.steps + WARM_UP):
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
    mean_ours, mean_plain = (statistics.median(x[WARM_UP:]) for x in (ours, plain))
    share = sum(loading[WARM_UP:]) / sum(ours[WARM_UP:])
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


def sized_model(mixer: str, parameters: int) -> LanguageModel:
    """Build a model of this mixer with MLPs as wide as make it this large."""
    sizes = {"num_heads": HEADS} if mixer == "attn" else {}

    def build(inner: int) -> LanguageModel:
        settings = {
            "pattern": f"{LAYERS}*{mixer}",
            "hidden_size": HIDDEN,
            "mixers": {mixer: sizes},
            "mlp": {"intermediate_size": inner},
        }
        config = build_config(ModelConfig, settings, f"a model of {mixer}")
        return build_model(config, VOCAB, seed=0)

    missing = parameters - sum(p.numel() for p in build(16).parameters())
    return build(16 * max(1 + round(missing / (3 * HIDDEN * LAYERS * 16)), 1))


def against_llama(arguments: argparse.Namespace) -> None:
    """Print the time of a step of each layer's model as a multiple of the Llama's."""
    start_processes()
    optimizer = OptimizerConfig(lr=1e-3)
    llama = LlamaLoop(optimizer.lr, optimizer.weight_decay)
    size = sum(p.numel() for p in llama.model.parameters())
    tokens = ROWS * SEQ_LEN
    print(
        f"Llama of {size / 1e6:.2f}M parameters: {LAYERS} blocks, width {HIDDEN}; {ROWS} x "
        f"{SEQ_LEN} tokens per step, {torch.get_num_threads()} threads"
    )
    models = {mixer: sized_model(mixer, size) for mixer in arguments.llama}
    engines = {mixer: Engine(model, optimizer) for mixer, model in models.items()}
    generator = np.random.default_rng(0)
    found: dict[str, list[np.ndarray]] = {mixer: [] for mixer in models}
    for step in range(arguments.steps + WARM_UP):
        rows = generator.integers(1, VOCAB, (ROWS, SEQ_LEN + 1))
        batch = pack_rows(rows, eod_id=0)
        ids = torch.from_numpy(rows[:, :SEQ_LEN])
        for number, (mixer, engine) in enumerate(engines.items()):
            sides: list[Callable[[], Any]] = [
                partial(llama.step, ids),
                partial(engine.train_step, [batch], optimizer.lr),
            ]
            order = (0, 1) if (step + number) % 2 else (1, 0)
            times = {side: _timed(sides[side]) for side in order}
            if step >= WARM_UP:
                found[mixer].append(np.stack([times[0], times[1]]))
    baseline = np.median(np.concatenate(list(found.values())), 0)[0, 0]
    print(f"{'Llama':10s} {size / 1e6:5.2f}M  {tokens / baseline:>7,.0f} tokens/s")
    for mixer, pairs in found.items():
        sides_of = np.stack(pairs)  # [steps, side, clock or CPU]
        count = sum(p.numel() for p in models[mixer].parameters())
        speed = tokens / np.median(sides_of[:, 1, 0])
        ratios = sides_of[:, 1] / sides_of[:, 0]
        clock, cpu = (_with_interval(ratios[:, kind]) for kind in (0, 1))
        print(
            f"{mixer:10s} {count / 1e6:5.2f}M  {speed:>7,.0f} tokens/s   "
            f"{clock} of the Llama's time, {cpu} of its CPU seconds"
        )


def _timed(step: Callable[[], Any]) -> tuple[float, float]:
    """Return the seconds of a step, on the clock and of this process's CPUs."""
    clock, cpu = time.perf_counter(), time.process_time()
    step()
    return time.perf_counter() - clock, time.process_time() - cpu


def _with_interval(ratios: np.ndarray) -> str:
    """Return the median, and the interval of 95 % of the medians of resampled ratios."""
    draws = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(draws, 1), [0.025, 0.975])
    return f"{np.median(ratios):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--llama", nargs="+", metavar="MIXER", help="compare models of these")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    if (arguments.config is None) == (arguments.llama is None):
        parser.error("expected either the configuration of a run or --llama with mixers")
    if arguments.llama:
        against_llama(arguments)
    else:
        against_bare_loop(arguments)


if __name__ == "__main__":
    main()
