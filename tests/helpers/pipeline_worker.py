"""Runs one batch through pipelines of two stages, and reports; see test_pipeline_memory.py.

``torchrun --nproc-per-node 2 -m tests.helpers.pipeline_worker FOLDER``
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.multiprocessing.reductions import StorageWeakRef

from pretrain.config import ParallelConfig
from pretrain.model.build import build_stages
from pretrain.parallel.processes import gather, is_main_process, stop_processes
from pretrain.training.engine import Engine
from tests.helpers.parallel_worker import OPTIMIZER, SEQ_LEN, settings, start
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import batches

LAYOUTS = {
    "stages": ParallelConfig(pipeline=2),
    "parts of stages": ParallelConfig(pipeline=2, virtual_pipeline=2),
}
MODEL = settings("gdn attn m2rnn gdn", tie_embeddings=False)
MICRO_BATCHES = 8


class Sending:
    """A message; whether its memory was there until the sender had waited for it."""

    def __init__(self, work: Any, tensor: torch.Tensor, report: list[bool]):
        self.work, self.report = work, report
        self.memory = StorageWeakRef(tensor.untyped_storage())

    def wait(self) -> None:
        self.report.append(not self.memory.expired())
        self.work.wait()


def make(parallel: ParallelConfig) -> Engine:
    stages = build_stages(MODEL, VOCAB, seed=0, seq_len=SEQ_LEN)
    return Engine(stages, OPTIMIZER, parallel)


def gradients(engine: Engine) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss of one batch, summed, and its gradients on this process."""
    engine.begin_step(0, 0)
    sums = engine.backend.forward_backward(batches(0, rows=MICRO_BATCHES, micro_batch_size=1))
    parameters: Any = [item for part in engine.parts for item in part.named_parameters()]
    return float(sums[0]), {name: each.main_grad.clone() for name, each in parameters}


def observed(parallel: ParallelConfig) -> dict[str, Any]:
    """Return loss and gradients, which messages were sent whole, and how many outputs were held."""
    engine = make(parallel)
    outputs: list[StorageWeakRef] = []
    held, whole = [0], list[bool]()

    def note(_: Any, __: Any, output: torch.Tensor) -> None:
        held.append(sum(not memory.expired() for memory in outputs))
        outputs.append(StorageWeakRef(output.untyped_storage()))

    for part in engine.parts:
        if not part.stage.last:
            part.register_forward_hook(note)
    isend = dist.isend

    def send(tensor: torch.Tensor, *to: Any, **where: Any) -> Sending:
        return Sending(isend(tensor, *to, **where), tensor, whole)

    alone = parallel.virtual_pipeline > 1  # messages in a batch take no other function
    with patch.object(dist, "isend", send if alone else isend):
        loss, found = gradients(engine)
    return {"loss": loss, "gradients": found, "whole": whole, "held": max(held)}


def main(folder: Path) -> None:
    for name, parallel in LAYOUTS.items():
        start(parallel)
        everyone = gather(observed(parallel))
        if is_main_process():
            torch.save(everyone, folder / f"{name}.pt")
        stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
