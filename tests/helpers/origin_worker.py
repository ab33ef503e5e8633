"""Plants numbers that are not finite on one of two processes, and looks for their origin.

``python -m tests.helpers.origin_worker FILE``, on two processes; see test_origin.py.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pretrain.config import ParallelConfig
from pretrain.parallel.processes import data_parallel_rank_and_size, stop_processes
from pretrain.training.engine import Engine
from pretrain.training.origin import Found, search
from tests.helpers import parallel_worker
from tests.helpers.parallel_worker import settings, start
from tests.helpers.small_training import batches

ROWS, LENGTH, TOKEN = 4, 32, 9
parallel_worker.MODELS["planted"] = settings("gdn attn gdn", tie_embeddings=False)
LAYOUTS = {
    "dp2-zero0": ParallelConfig(zero_stage=0),
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
    "deepspeed-zero1": ParallelConfig(zero_backend="deepspeed"),
    "deepspeed-zero2": ParallelConfig(zero_backend="deepspeed", zero_stage=2),
    "deepspeed-zero3": ParallelConfig(zero_backend="deepspeed", zero_stage=3),
}


def step_batches() -> list[Any]:
    rank, size = data_parallel_rank_and_size()
    return batches(0, rows=ROWS, micro_batch_size=1, length=LENGTH)[rank::size]


def plant(engine: Engine, module: str, value: float, *, backward: bool = False, token: int = TOKEN):
    """Have ``value`` come out of a module of this process, or into its gradient, at one token."""

    def spoil(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[token % len(x), 0, 0] = value
        return x

    def after(_: Any, given: Any, output: Any) -> Any:
        if backward:
            given[0].register_hook(spoil)
            return None
        return (spoil(output[0]), *output[1:]) if isinstance(output, tuple) else spoil(output)

    handles = []
    for part in engine.parts:
        for name, found in part.named_modules():
            if name == module:
                handles.append(found.register_forward_hook(after))
    return handles


def as_dict(found: Found) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"finite": found.finite}


def look(parallel: ParallelConfig) -> dict[str, Any]:
    """What is found: of a mixer, of a gradient, and without a plant; and how training goes on."""
    engine = parallel_worker.make("planted", parallel)
    local = step_batches()
    results: dict[str, Any] = {}
    guilty = dist.get_rank() == dist.get_world_size() - 1
    for name, module, backward, value in (
        ("forward", "blocks.2.mixer_norm", False, math.nan),
        ("infinity", "blocks.2.mixer_norm", False, math.inf),
        ("backward", "blocks.2.mlp", True, math.nan),
    ):
        handles = plant(engine, module, value, backward=backward) if guilty else []
        engine.begin_step(0, 0, *data_parallel_rank_and_size())
        assert not engine.train_step(local, 1e-3).applied
        results[name] = as_dict(search(engine, local, 0, 0))
        for handle in handles:
            handle.remove()
    engine.begin_step(0, 0, *data_parallel_rank_and_size())
    results["none"] = as_dict(search(engine, local, 0, 0))
    results["after"] = [parallel_worker.step_of(engine, step, ROWS) for step in range(2)]
    other = parallel_worker.make("planted", parallel)
    results["without"] = [parallel_worker.step_of(other, step, ROWS) for step in range(2)]
    return results


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name, parallel in LAYOUTS.items():
        start(parallel)
        found[name] = look(parallel)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main()
