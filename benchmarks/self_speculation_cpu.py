"""Time self-speculation against greedy decoding: drafts of a loop's first passes, then checked.

``OMP_NUM_THREADS=1 python benchmarks/self_speculation_cpu.py`` prints tokens per CPU second of
both, turn by turn, their ratio and the share of drafts that were right. The models are random, and
the size of what their loop adds is chosen so that early passes are right more or less often.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Iterator
from typing import Any

import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.inference.generate import generate
from pretrain.inference.speculate import Drafts, Speculation, speculate
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes, stop_processes

VOCAB = 4096
PATTERNS = {"attention": "4*attn", "gdn hybrid": "attn gdn gdn attn"}
SCALES = (0.1, 0.01)  # of what the loop's blocks add


def make(pattern: str, times: int, scale: float) -> LanguageModel:
    """Return a random model whose loop adds ``scale`` times as much as usual."""
    loop = {"prelude": 1, "coda": 1, "times": times}
    values = {"hidden_size": 256, "pattern": pattern, "recursion": loop, "init_std": 0.05}
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0).eval()
    with torch.no_grad():
        for index in model.loop:
            for name, weight in model.blocks[index].named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.mul_(scale)
    return model


def timed(written: Iterator[int]) -> tuple[float, list[int]]:
    """Return the CPU seconds that a text took, and its ids."""
    begun = time.process_time()
    ids = list(written)
    return time.process_time() - begun, ids


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--times", type=int, default=8, help="passes of the loop")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    start_processes()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"4 blocks, 256 wide, float32, {given.times} passes, {given.tokens} tokens"
    )
    prompt = torch.randint(VOCAB, (32,), generator=torch.Generator().manual_seed(0)).tolist()
    limits: Any = {"max_tokens": given.tokens, "vocab_size": VOCAB}
    for name, pattern in PATTERNS.items():
        for scale in SCALES:
            model = make(pattern, given.times, scale)
            for how in (Speculation(4), Speculation(4, 2)):
                plain, drafted, drafts = list[float](), list[float](), Drafts()
                for _ in range(given.rounds):  # in turn, so that both meet the same machine
                    written = generate(model, prompt, temperature=0.0, seed=0, **limits)
                    seconds, expected = timed(written)
                    plain.append(seconds)
                    seconds, found = timed(speculate(model, prompt, how, drafts=drafts, **limits))
                    drafted.append(seconds)
                    same = "the same ids" if found == expected else "OTHER IDS"
                a, b = (sorted(times)[given.rounds // 2] for times in (plain, drafted))
                print(
                    f"{name:11} loop x {scale:<4} --speculate {how}: "
                    f"{given.tokens / a:7.1f} -> {given.tokens / b:7.1f} "
                    f"tokens per CPU second, {a / b:.2f} x, "
                    f"{same}; {drafts}",
                    flush=True,
                )
    stop_processes()


if __name__ == "__main__":
    main()
