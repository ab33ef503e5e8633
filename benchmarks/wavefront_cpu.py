"""Time the wavefront sampler of recurrent depth, and exits, against plain decoding, in turn.

``OMP_NUM_THREADS=1 python benchmarks/wavefront_cpu.py [RUN] [--tokens 64] [--rounds 3]`` prints the
tokens per CPU second of both, their ratio, passes and calls of the loop per token, and how many
tokens are plain decoding's, for several windows and exits of tokens. Without a run the model is a
random one whose loop settles: what a trained one does depends on its training.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.inference.exiting import ExitingModel
from pretrain.inference.exits import ExitRule
from pretrain.inference.generate import generate
from pretrain.inference.load import load_model
from pretrain.inference.wavefront import Draw, WavefrontReport, wavefront_ids
from pretrain.inference.wavefront_rules import Wavefront
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes, stop_processes

VOCAB, PASSES, WIDTH = 4096, 16, 256
PROMPT = list(range(1, 33))
SHARED: dict[str, Any] = {"noise": 0.0, "ema": 0.0}
CASES = {
    "shared cache, one at a time": Wavefront(wavefront=1, criterion="fixed", **SHARED),
    "one at a time, eps 0.03": Wavefront(wavefront=1, inner=1, **SHARED),
    "window 4, inner 2": Wavefront(wavefront=4, inner=2, **SHARED),
    "window 8, inner 4": Wavefront(wavefront=8, inner=4, **SHARED),
    "window 128, inner 4, noise": Wavefront(),
    "published, window 8, inner 4": Wavefront(wavefront=8, inner=4, published=True, **SHARED),
}
EXITS = ("latent:0.03", "kl:1e-3", "argmax:5")


def random_model() -> LanguageModel:
    """Return a model whose adapter reads its state less than its input: its loop settles."""
    values = {
        "hidden_size": WIDTH,
        "pattern": "4*attn",
        "mixers": {"attn": {"num_heads": 4}},
        "recursion": {
            "prelude": 1,
            "coda": 1,
            "times": PASSES,
            "adapter": True,
            "state_init": "random",
            "normalize_state": True,
        },
        "block_norm": "sandwich",
    }
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0).eval()
    assert model.recursion is not None
    with torch.no_grad():
        model.recursion.adapter[:, :WIDTH] *= 0.3
    return model


def timed(rounds: int, *makers: Callable[[], list[int]]) -> list[tuple[float, list[int]]]:
    """Return the least CPU seconds of each in ``rounds`` turns, and its ids."""
    best, ids = [float("inf")] * len(makers), [list[int]() for _ in makers]
    for _ in range(rounds):
        for i, make in enumerate(makers):
            begun = time.process_time()
            ids[i] = make()
            best[i] = min(best[i], time.process_time() - begun)
    return list(zip(best, ids, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", help="a run with recurrent depth (a random model)")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    start_processes()
    model, vocab, prompt = random_model(), VOCAB, PROMPT
    if given.run:
        loaded = load_model(given.run)
        model, vocab = loaded.model, loaded.candidates
        prompt = loaded.prompt_ids("def read(self, size=-1):\n")
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{given.run or f'a random model {WIDTH} wide'}, {given.tokens} tokens"
    )

    def plain() -> list[int]:
        found = generate(
            model, prompt, max_tokens=given.tokens, temperature=0, seed=0, vocab_size=vocab
        )
        return list(found)

    for name, config in CASES.items():
        report = WavefrontReport()

        def parallel(config: Wavefront = config, report: WavefrontReport = report) -> list[int]:
            return list(
                wavefront_ids(
                    model, prompt, config, Draw(vocab), max_tokens=given.tokens, report=report
                )
            )

        (seconds, ids), (ours, found) = timed(given.rounds, plain, parallel)
        equal = sum(a == b for a, b in zip(ids, found, strict=True))
        print(
            f"{name:30} {given.tokens / ours:7.1f} tokens per CPU second, plain "
            f"{given.tokens / seconds:7.1f}: {seconds / ours:5.2f}x; {equal} tokens equal; "
            f"{report.describe()}",
            flush=True,
        )
    for rule in EXITS:
        leaving = ExitingModel(model, ExitRule.parse(rule), vocab)

        def exiting(leaving: ExitingModel = leaving) -> list[int]:
            written = generate(
                leaving, prompt, max_tokens=given.tokens, temperature=0, seed=0, vocab_size=vocab
            )
            return list(written)

        (seconds, ids), (ours, found) = timed(given.rounds, plain, exiting)
        equal = sum(a == b for a, b in zip(ids, found, strict=True))
        print(
            f"{'exit ' + rule:30} {given.tokens / ours:7.1f} tokens per CPU second, plain "
            f"{given.tokens / seconds:7.1f}: {seconds / ours:5.2f}x; {equal} tokens equal; "
            f"{leaving.summary()['mean_passes']:.2f} passes per token",
            flush=True,
        )
    stop_processes()


if __name__ == "__main__":
    main()
