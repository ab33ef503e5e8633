"""Time what ``logging.blocks`` costs: steps that are watched, against steps that are not.

    python benchmarks/blocks_cpu.py [PATTERN] [--hidden 256] [--seq-len 512] [--steps 20]

Watched steps and others alternate within one run, so that other work on the machine affects both.
Printed is the median over pairs of neighbouring steps of the time of a watched one, its statistics
gathered and described, as a multiple of the other's; and what a run with ``logging.blocks: 100``
takes longer.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import Batch, pack_rows
from pretrain.model.build import build_model
from pretrain.parallel.processes import process_groups
from pretrain.training.block_statistics import BlockStatistics
from pretrain.training.engine import Engine
from pretrain.training.metrics import LayerMetrics

VOCAB, ROWS, EVERY = 8192, 4, 100


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="2*(3*gdn attn)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps (20)")
    options = parser.parse_args()
    with process_groups(ParallelConfig()):
        ratio = measure(options.pattern, options.hidden, options.seq_len, options.steps)
    print(f"{options.pattern}, {options.hidden} wide, {ROWS} x {options.seq_len} tokens:")
    print(f"  a watched step takes {ratio:.2f} times as long as another")
    print(f"  logging.blocks={EVERY}: {(ratio - 1) / EVERY:.2%} of the run's time")


def measure(pattern: str, hidden: int, seq_len: int, pairs: int) -> float:
    """Return the median of a watched step's time as a multiple of that of the one before it."""
    values = {"hidden_size": hidden, "pattern": pattern}
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0)
    engine = Engine(model, OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, seq_len + 1))
    batch = pack_rows(tokens, eod_id=7)
    step(engine, batch, watched=False)
    ratios = []
    for _ in range(pairs):
        plain = step(engine, batch, watched=False)
        ratios.append(step(engine, batch, watched=True) / plain)
    return statistics.median(ratios)


def step(engine: Engine, batch: Batch, *, watched: bool) -> float:
    """Return the seconds of one step."""
    start = time.perf_counter()
    found = BlockStatistics(engine, LayerMetrics())
    if watched:
        found.open()
    engine.begin_step(0, 0)
    engine.train_step([batch], 1e-4)
    if watched:
        found.close()
        found.rows()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
