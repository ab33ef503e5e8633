"""One training step on one long document, segment by segment, with little memory.

``python -m benchmarks.segments_cpu --tokens 524288 [--segment 4096]`` makes one step of the engine
on each of the lengths, in float32. ``--check 16384`` compares with the row as a whole, of so many
tokens: gradients in float64, then a step of the engine. Each is in a process of its own, whose peak
memory it says.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime

import numpy as np
import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig
from pretrain.data.batch import Batch
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.model.language_model import LanguageModel
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.training.engine import Engine

VOCAB = 512
MODEL = {
    "hidden_size": 160,
    "pattern": "gdn mamba2 swa gla gdn",
    "mixers": {"swa": {"window": 256}},
}


def main() -> None:
    """Measure, each in a process of its own, and print a report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[])
    parser.add_argument("--segment", type=int, default=4096)
    parser.add_argument("--check", type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one is not None:
        print(json.dumps(_measure(json.loads(options.one))))
        return
    print(
        f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, one thread, torch "
        f"{torch.__version__}; {_describe()}; one document, segments of {options.segment:,} tokens"
    )
    cases = [(tokens, options.segment) for tokens in options.tokens]
    if options.check is not None:
        compared = {"tokens": options.check, "segment": options.segment, "compare": True}
        print(
            f"{options.check:,} tokens in float64: largest relative error of a gradient "
            f"{_apart(compared)['error']:.1e}"
        )
        cases = [(options.check, None), *cases]
    for tokens, segment in cases:
        found = _apart({"tokens": tokens, "segment": segment})
        print(
            f"{tokens:>9,} tokens {'by segments' if segment else 'as a whole '}: "
            f"{found['seconds']:7.1f} s, peak {found['peak'] / 2**20:7,.0f} MiB, before the step "
            f"{found['before'] / 2**20:5,.0f} MiB, loss {found['loss']:.4f}, gradient norm "
            f"{found['norm']:.4f}",
            flush=True,
        )


def _apart(case: dict[str, object]) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.segments_cpu", "--one", json.dumps(case)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return found


def _describe() -> str:
    model = _model(torch.float32)
    return f"{sum(p.numel() for p in model.parameters()):,} parameters, {MODEL['pattern']}"


def _model(dtype: torch.dtype) -> LanguageModel:
    return build_model(build_config(ModelConfig, MODEL, "benchmark"), VOCAB, seed=0, dtype=dtype)


def _measure(case: dict[str, int]) -> dict[str, float]:
    tokens = np.random.default_rng(0).integers(1, VOCAB, (1, case["tokens"] + 1))
    batch = pack_rows(tokens, eod_id=0)
    if case.get("compare"):
        return {"error": _error(batch, case["segment"])}
    start_processes()
    model = _model(torch.float32)
    model.segment_tokens = case["segment"]
    engine = Engine(model, OptimizerConfig())
    engine.begin_step(0, 0)
    before, start = _peak(), time.monotonic()
    result = engine.train_step([batch], 1e-3)
    found = {"seconds": time.monotonic() - start, "peak": _peak(), "before": before}
    stop_processes()
    return found | {"loss": result.loss, "norm": float(result.grad_norm or 0)}


def _error(batch: Batch, segment: int) -> float:
    model = _model(torch.float64)
    gradients = []
    for size in (None, segment):
        model.zero_grad()
        model.segment_tokens = size
        model(batch.tokens, batch.targets, sequences=batch.sequences).sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    pairs = zip(*gradients, strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
