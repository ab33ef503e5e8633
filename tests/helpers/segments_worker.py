"""Trains models whose rows come in segments on two processes; see test_segmented_layouts.py.

``torchrun --nproc-per-node 2 -m tests.helpers.segments_worker FILE``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from pretrain.config import ParallelConfig
from pretrain.data.validation import share_of
from pretrain.model.build import build_stages
from pretrain.parallel.processes import data_parallel_rank_and_size, stop_processes
from pretrain.training.engine import Engine
from tests.helpers.parallel_worker import MODELS, OPTIMIZER, SEQ_LEN, start, step_of
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import batches

STEPS, ROWS = 2, 4  # the second step and the validation see what was updated
LAYOUTS = {
    "dp2": ParallelConfig(),
    "dp2-zero0": ParallelConfig(zero_stage=0),
    "dp2-late": ParallelConfig(overlap=False),
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "ep2": ParallelConfig(expert=2),
}
CASES = [
    *(("tied", layout) for layout in ("dp2", "dp2-zero0", "dp2-late", "tp2")),
    *(("untied", layout) for layout in ("dp2", "tp2-sequence")),
    *(("options", layout) for layout in ("dp2", "tp2", "tp2-sequence")),
    *(("experts", layout) for layout in ("dp2", "tp2-sequence", "ep2")),
    *(("lengths", layout) for layout in ("dp2", "dp2-zero0")),
]


def train(model, parallel, segment_tokens):
    """(loss, gradient norm) of a few steps, and the validation loss behind them."""
    stages = build_stages(
        MODELS[model], VOCAB, seed=0, seq_len=SEQ_LEN, sequence_parallel=parallel.sequence
    )
    for stage in stages:
        stage.segment_tokens = segment_tokens
    engine = Engine(stages, OPTIMIZER, parallel)
    lengths = (SEQ_LEN, 16) if model == "lengths" else (SEQ_LEN,)
    results = [step_of(engine, step, ROWS, lengths) for step in range(STEPS)]
    rank, size = data_parallel_rank_and_size()
    held_out = share_of(batches(99, rows=5, micro_batch_size=1), rank, size)
    return [*results, engine.validate(held_out)]


def main(path):
    found = {}
    for model, layout in CASES:
        start(LAYOUTS[layout])
        # Tensor-parallel ranks exchange something in every segment: of them there are fewer.
        size = 16 if LAYOUTS[layout].tensor > 1 else 8
        found[f"{model}-{layout}"] = train(model, LAYOUTS[layout], size)
    if dist.get_rank() == 0:
        path.write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
