"""Trains the small hybrid on two data-parallel processes; see test_engine.py.

``torchrun --nproc-per-node 2 -m tests.helpers.data_parallel_worker FILE``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    is_main_process,
    start_processes,
    stop_processes,
)
from pretrain.training.engine import Engine
from tests.helpers.small_training import OPTIMIZER, STEPS, batches, make


def main(path: Path) -> None:
    start_processes()
    engine = Engine(make(), OPTIMIZER)
    rank, size = data_parallel_rank_and_size()
    assert size == 2
    results = [
        engine.train_step(batches(step, micro_batch_size=1)[rank::size], 1e-3)
        for step in range(STEPS)
    ]
    if is_main_process():
        path.write_text(json.dumps([(r.loss, r.grad_norm) for r in results]))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
