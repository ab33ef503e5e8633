"""Trains with prefixes and hidden tokens on two processes.

``torchrun --nproc-per-node 2 -m tests.helpers.prefix_worker FILE``, see test_prefix_layouts.py.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from pretrain.config import ParallelConfig, PrefixConfig
from pretrain.data.batch import Batch
from pretrain.data.prefixes import generator_of, with_prefixes
from pretrain.model.build import build_stages
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    gather,
    is_main_process,
    stop_processes,
)
from pretrain.training.engine import Engine, StepResult
from tests.helpers.parallel_worker import OPTIMIZER, SEQ_LEN, start
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import batches

MODEL = settings(
    pattern="jrt attn jrt gdn",
    mixers={
        "jrt": {"num_heads": 2, "feature_dim": 3, "chunk_size": 8, "prefix_length": 12},
        "attn": {"num_heads": 4},
        "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
    },
    mlp={"ratio": 2},
    tie_embeddings=False,
)
PREFIX = PrefixConfig(tokens=12, fraction=0.8, length="drawn", mask_fraction=0.4, mask_id=3)
TOKENIZER: Any = SimpleNamespace(vocab_size=VOCAB, eod_id=7)
# Of one step in float64, gradients; megatron-core shards no optimizer of it.
ALONE = ParallelConfig(zero_stage=0)
GRADIENTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2": ParallelConfig(),
}
GRADIENTS = {name: replace(parallel, zero_stage=0) for name, parallel in GRADIENTS.items()}
# Of some steps in float32, the losses.
STEPS = {
    "dp2-zero1": ParallelConfig(),
    "tp2-zero1": ParallelConfig(tensor=2),
    "deepspeed-dp2-zero2": ParallelConfig(zero_backend="deepspeed", zero_stage=2),
    "deepspeed-pp2": ParallelConfig(zero_backend="deepspeed", pipeline=2),
}


def rows(step: int) -> list[Batch]:
    """Return a step's samples, each a micro-batch."""
    plain = batches(step, rows=4, micro_batch_size=1)
    return [
        with_prefixes(b, PREFIX, TOKENIZER, [generator_of(1, step, n)]) for n, b in enumerate(plain)
    ]


def engine_of(parallel: ParallelConfig, dtype: torch.dtype) -> Engine:
    stages = build_stages(
        MODEL,
        VOCAB,
        seed=0,
        seq_len=SEQ_LEN,
        dtype=dtype,
        sequence_parallel=parallel.sequence,
    )
    return Engine(stages, OPTIMIZER, parallel)


def gradients(parallel: ParallelConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what is reported of a step in float64, and this process's gradients.

    megatron-core sums them in float32.
    """
    rank, size = data_parallel_rank_and_size()
    engine = engine_of(parallel, torch.float64)
    engine.begin_step(0, 0, rank, size)
    sums = engine.backend.forward_backward(rows(0)[rank::size])
    named: Any = [item for part in engine.parts for item in part.named_parameters()]
    return sums, {name: p.main_grad.clone() for name, p in named}


def steps(parallel: ParallelConfig) -> list[StepResult]:
    """Return the outcomes of some steps in float32."""
    rank, size = data_parallel_rank_and_size()
    engine = engine_of(parallel, torch.float32)
    found = []
    for step in range(3):
        engine.begin_step(0, step, rank, size)
        found.append(engine.train_step(rows(step)[rank::size], 1e-3))
    return found


def main(path: Path) -> None:
    found: dict[str, Any] = {}
    for name, parallel in GRADIENTS.items():
        start(parallel)
        found[name] = gather(gradients(parallel))
    for name, parallel in STEPS.items():
        start(parallel)
        found[name] = [vars(result) for result in steps(parallel)]
    if is_main_process():
        torch.save(found, path)
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
