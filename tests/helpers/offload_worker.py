"""ZeRO-3 with the optimizer's state in files, in memory, and a plain loop: one line of JSON.

DeepSpeed's compiled reading and writing takes minutes to build, so that a plain one stands in; what
moves states to files and back is DeepSpeed's own.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed.ops.op_builder
import deepspeed.runtime.swap_tensor.partitioned_optimizer_swapper as swapper
import numpy as np
import torch
from torch import Tensor

from pretrain.checkpoint.storage import load_state, save_state
from pretrain.config import ParallelConfig
from pretrain.model.build import build_model, build_stages
from pretrain.optim.backends.deepspeed import shard_parameters
from pretrain.parallel.processes import data_parallel_rank_and_size, start_processes, stop_processes
from pretrain.training.engine import Engine
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import OPTIMIZER, batches, plain_loop

# Wide enough for files: DeepSpeed leaves less than 1 MB in memory.
MODEL = {"init_std": 0.05, "hidden_size": 120}


class PlainHandle:
    """Stands in for the compiled ``aio_handle``."""

    def __init__(self, **_: Any):
        self.buffers: list[Tensor] = []
        self.pending = 0
        self.moved = 0

    def new_cpu_locked_tensor(self, count: int, like: Tensor) -> Tensor:
        self.buffers.append(torch.zeros(count, dtype=like.dtype))
        return self.buffers[-1]

    def free_cpu_locked_tensor(self, buffer: Tensor) -> None:
        self.buffers = [b for b in self.buffers if b is not buffer]

    def is_pinned(self, tensor: Tensor) -> bool:
        place = tensor.data_ptr()
        return any(b.data_ptr() <= place < b.data_ptr() + b.nbytes for b in self.buffers)

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        buffer.numpy().tofile(path)
        return self._began(buffer)

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        buffer.copy_(torch.from_numpy(np.fromfile(path, np.float32, buffer.numel())))
        return self._began(buffer)

    def _began(self, buffer: Tensor) -> int:
        self.pending += 1
        self.moved += buffer.nbytes
        return 0

    def wait(self) -> int:
        done, self.pending = self.pending, 0
        return done


class PlainBuilder:
    def is_compatible(self, verbose: bool = False) -> bool:
        return True

    def load(self) -> Any:
        return SimpleNamespace(aio_handle=PlainHandle)


def compare(folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    memory = ParallelConfig(zero_stage=3, zero_backend="deepspeed")
    files = ParallelConfig(
        zero_stage=3, zero_backend="deepspeed", offload="nvme", offload_path=str(folder / "files")
    )

    def engine(parallel: ParallelConfig) -> Engine:
        stages = build_stages(
            settings(**MODEL), VOCAB, seed=0, seq_len=33, dtype=dtype, filled=shard_parameters
        )
        return Engine(stages, OPTIMIZER, parallel)

    def steps(engine: Engine, *numbers: int) -> list[tuple[float, float | None]]:
        rank, size = data_parallel_rank_and_size()
        results = [
            engine.train_step(batches(n, micro_batch_size=2 // size)[rank::size], 1e-3)
            for n in numbers
        ]
        return [(r.loss, r.grad_norm) for r in results]

    def save(engine: Engine, name: str) -> None:
        (folder / f"saved-{name}").mkdir(parents=True, exist_ok=True)
        u = engine.backend
        save_state(
            {**u.weights_state(saving=True), **u.optimizer_state(saving=True)},
            folder / f"saved-{name}",
            None,
        )

    def load(engine: Engine, name: str) -> None:
        load_state(engine.backend.weights_state(saving=False), folder / f"saved-{name}")
        load_state(engine.backend.optimizer_state(saving=False), folder / f"saved-{name}")
        engine.backend.loaded(2)

    found: dict[str, Any] = {}
    model = build_model(settings(**MODEL), VOCAB, seed=0, dtype=dtype)
    found["plain"] = plain_loop(model) if dtype == torch.float32 else []
    first, second = engine(memory), engine(files)
    moved = second.backend.optimizer.optimizer_swapper.aio_handle
    found["memory"], found["files"] = steps(first, 0, 1), steps(second, 0, 1)
    save(first, "memory")
    save(second, "files")
    found["memory"] += steps(first, 2, 3)
    found["files"] += steps(second, 2, 3)
    found["moved"] = moved.moved
    for name, parallel, source in (
        ("files from memory", files, "memory"),
        ("memory from files", memory, "files"),
    ):
        other = engine(parallel)
        load(other, source)
        found[name] = steps(other, 2, 3)
    # Into an engine that has gone on, as a rollback does.
    load(first, "memory")
    found["memory rolled back"] = steps(first, 2, 3)
    load(second, "files")
    found["files rolled back"] = steps(second, 2, 3)
    return found


def main(folder: Path) -> None:
    deepspeed.ops.op_builder.AsyncIOBuilder = PlainBuilder
    swapper.AsyncIOBuilder = PlainBuilder
    start_processes()
    found: dict[str, Any] = {
        str(dtype): compare(folder / str(dtype), dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    stop_processes()
    found["left"] = [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name in os.environ]
    if int(os.environ.get("RANK", "0")) == 0:
        print("RESULT", json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
