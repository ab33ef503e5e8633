"""Measure what ``logging.blocks`` costs: steps that are watched, against steps that are not.

    python benchmarks/blocks_cpu.py [PATTERN] [--hidden 256] [--seq-len 512] [--steps 20]

Watched steps and others alternate within one run, each pair in either order in turn, so that other
work on the machine affects both. A watched step counts with its statistics gathered, described and
written to a log. Printed are medians over pairs, with the interval that 95 % of the medians of
resampled pairs lie in, on the clock and of this process's CPU seconds: of the watched step's time
as a multiple of the other's, and of what a run with ``logging.blocks: 100`` takes longer, of whose
steps every hundredth is watched. The defaults take some two minutes on a quiet core
(``OMP_NUM_THREADS=1``); of CPU seconds a busy machine changes little.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from pretrain.common.config_loader import build_config
from pretrain.config import LoggingConfig, ModelConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batch import Batch
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.parallel.processes import process_groups
from pretrain.run_directory import RunDirectory
from pretrain.training.block_statistics import BlockStatistics
from pretrain.training.engine import Engine
from pretrain.training.log import RunLog
from pretrain.training.metrics import LayerMetrics

VOCAB, ROWS, EVERY = 8192, 4, 100
WARM_UP = 2  # pairs that are not counted


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pattern", nargs="?", default="2*(3*gdn attn)")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--steps", type=int, default=20, help="pairs of steps (20)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    with process_groups(ParallelConfig()), tempfile.TemporaryDirectory() as folder:
        sizes = options.hidden, options.seq_len, options.steps
        ratios = measure(options.pattern, *sizes, Path(folder))
    print(f"{options.pattern}, {options.hidden} wide, {ROWS} x {options.seq_len} tokens:")
    for kind, words in enumerate(("on the clock", "in CPU seconds")):
        low, median, high = with_interval(ratios[:, kind])
        print(
            f"  {words}: a watched step takes {median:.2f} ({low:.2f} to {high:.2f}) times as long"
        )
        low, median, high = ((x - 1) / EVERY for x in (low, median, high))
        print(f"    logging.blocks={EVERY}: {median:.2%} ({low:.2%} to {high:.2%}) of the time")


def measure(pattern: str, hidden: int, seq_len: int, pairs: int, folder: Path) -> np.ndarray:
    """Return for each pair of steps the watched one's seconds by the other's: clock, CPU."""
    values = {"hidden_size": hidden, "pattern": pattern}
    model = build_model(build_config(ModelConfig, values, "benchmark"), VOCAB, seed=0)
    engine = Engine(model, OptimizerConfig())
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, seq_len + 1))
    batch = pack_rows(tokens, eod_id=7)
    directory = RunDirectory(folder)
    directory.metrics_file.touch()
    log = RunLog(directory, LoggingConfig(blocks=1), active=True, num_steps=2 * pairs, step=0)
    ratios = []
    for pair in range(-WARM_UP, pairs):
        seconds = {}
        for watched in (False, True) if pair % 2 else (True, False):
            seconds[watched] = step(engine, batch, log if watched else None)
        if pair >= 0:
            ratios.append(seconds[True] / seconds[False])
    log.close()
    return np.array(ratios)


def step(engine: Engine, batch: Batch, log: RunLog | None) -> np.ndarray:
    """Return the seconds of one step on the clock and of the CPU; ``log``: it is watched."""
    start = np.array([time.perf_counter(), time.process_time()])
    found = BlockStatistics(engine, LayerMetrics())
    if log is not None:
        found.open()
    engine.begin_step(0, 0)
    engine.train_step([batch], 1e-4)
    if log is not None:
        found.close()
        log.blocks(1, batch.tokens.numel(), found.rows())
    return np.array([time.perf_counter(), time.process_time()]) - start


def with_interval(ratios: np.ndarray) -> tuple[float, float, float]:
    """Return the median, between the ends of where 95 % of resampled ratios' medians lie."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    low, high = np.quantile(np.median(drawn, axis=1), (0.025, 0.975))
    return float(low), float(np.median(ratios)), float(high)


if __name__ == "__main__":
    main()
