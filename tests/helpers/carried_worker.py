"""Trains models whose rows carry states on two processes; see test_carried_layouts.py.

``torchrun --nproc-per-node 2 -m tests.helpers.carried_worker FOLDER``
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config import ParallelConfig, RunConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_stages
from pretrain.model.carried import CarriedStates
from pretrain.optim.backends.deepspeed import shard_parameters
from pretrain.parallel.pipeline import local_part
from pretrain.parallel.processes import (
    context_group,
    data_parallel_rank_and_size,
    stop_processes,
)
from pretrain.run_directory import find_checkpoint
from pretrain.training.engine import Engine
from tests.helpers.parallel_worker import OPTIMIZER, settings, start
from tests.helpers.recursion_kinds import KINDS
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import STATE


def deepspeed(stage, **layout):
    return ParallelConfig(zero_backend="deepspeed", zero_stage=stage, **layout)


ROWS, LENGTH, STEPS, EOD = 4, 24, 3, 7
MODELS = {
    "hybrid": settings("gdn swa slstm mamba2", dropout=0.2),
    "block": settings("kda swa gru retnet"),
    "experts": settings(
        "gdn swa", moe={"num_experts": 4, "top_k": 2, "intermediate_size": 16, "balance_weight": 0}
    ),
    "loop": settings("gru gdn swa", recursion=KINDS["lora"]),
    "shift": settings("retnet gru hgrn swa", mlp={"kind": "rwkv", "ratio": 2}),
}
LAYOUTS = {
    "dp2": ParallelConfig(micro_batch_size=1),
    "dp2-zero0": ParallelConfig(micro_batch_size=2, zero_stage=0),
    "ep2": ParallelConfig(micro_batch_size=1, expert=2),
    "tp2": ParallelConfig(micro_batch_size=2, tensor=2),
    "tp2-sequence": ParallelConfig(micro_batch_size=1, tensor=2, sequence=True),
    "pp2": ParallelConfig(micro_batch_size=2, pipeline=2),
    "pp2-vpp2": ParallelConfig(micro_batch_size=1, pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(micro_batch_size=1, context=2),
    "cp2-rows": ParallelConfig(micro_batch_size=4, context=2),
    "cp2-heads": ParallelConfig(
        micro_batch_size=1, context=2, context_cells="heads", context_scans="ring"
    ),
    "deepspeed-dp2-zero0": deepspeed(0, micro_batch_size=1),
    "deepspeed-pp2-zero1": deepspeed(1, micro_batch_size=2, pipeline=2),
    "deepspeed-dp2-zero2": deepspeed(2, micro_batch_size=1),
    "deepspeed-dp2-zero3": deepspeed(3, micro_batch_size=1),
}
ALONE = ParallelConfig(micro_batch_size=2, zero_stage=0)
NOISE = dict.fromkeys(
    ("dp2", "dp2-zero0", "pp2", "cp2", "cp2-rows", "deepspeed-pp2-zero1", "deepspeed-dp2-zero3"),
    0.3,
)
CASES = [
    *(("hybrid", layout) for layout in LAYOUTS if layout != "ep2"),
    *(("experts", layout) for layout in ("dp2", "ep2")),
    *(("block", layout) for layout in ("dp2", "tp2", "pp2", "cp2")),
    *(("loop", layout) for layout in ("dp2", "tp2-sequence", "pp2", "cp2")),
]
# Of segments, in float64, gradients too.
EXACT = [("hybrid", "cp2"), ("shift", "cp2"), ("shift", "cp2-heads"), ("loop", "cp2")]
RESUMED = ("tp2", "cp2", "deepspeed-dp2-zero2", "deepspeed-dp2-zero3")  # after every step
# One step under each, from the checkpoint of the one before, the last on one process.
ACROSS = ["dp2", "cp2", "pp2", "deepspeed-dp2-zero2", "dp2-zero0", "cp2-rows", "pp2-vpp2"]


def batches(step, parallel):
    """This process's micro-batches of rows that read on."""
    tokens = np.random.default_rng(0).integers(0, VOCAB, (ROWS, LENGTH * (len(ACROSS) + 2)))
    rows = tokens[:, step * LENGTH : (step + 1) * LENGTH + 1]
    rank, size = data_parallel_rank_and_size()
    count = parallel.micro_batch_size
    parts = np.split(rows, ROWS // count)[rank::size]
    return [pack_rows(part, EOD, [step > 0] * count) for part in parts]


def build(model, parallel, noise, seed=0, dtype=torch.float32):
    stages = build_stages(
        MODELS[model],
        VOCAB,
        seed=seed,
        seq_len=LENGTH,
        sequence_parallel=parallel.sequence,
        activation_checkpointing="block" if model == "block" else "none",
        dtype=dtype,
        context_cells="heads" if parallel.context_cells == "heads" else "chain",
        filled=shard_parameters if parallel.zero_stage == 3 else None,
    )
    _, size = data_parallel_rank_and_size()
    count = parallel.micro_batch_size
    for stage in stages:
        stage.carried = CarriedStates(stage, ROWS // count // size, count, noise)
    return stages


def make(model, parallel, noise, seed=0):
    return Engine(build(model, parallel, noise, seed), OPTIMIZER, parallel)


def gradients(model, parallel):
    """The summed loss and its gradients in float64, ``[STEPS, 1 + parameters]``."""
    (whole,) = build(model, parallel, 0.3, dtype=torch.float64)
    if whole.recursion is not None:
        whole.recursion.in_step = True
    found = []
    for step in range(STEPS):
        whole.begin_step(0, step)
        whole.zero_grad()
        parts = batches(step, parallel)
        whole.carried.expect(parts)
        loss = torch.zeros((), dtype=torch.float64)
        for part in map(local_part, parts):
            losses = whole(part.tokens, part.targets, **part.seen)
            total = (losses * part.loss_mask).sum()
            total.backward()
            loss += total.detach()
        whole.carried.finish()
        learning = [p.grad.flatten() for p in whole.parameters() if p.grad is not None]
        found.append(torch.cat([loss[None], *learning]))
    result = torch.stack(found)
    if (group := context_group()) is not None:
        dist.all_reduce(result, group=group)
    return result


def step_of(engine, step, parallel):
    engine.begin_step(0, step, *data_parallel_rank_and_size())
    result = engine.train_step(batches(step, parallel), 1e-3)
    return result.loss, result.grad_norm


def train(model, parallel, noise=0.0):
    """(loss, gradient norm) of a few steps."""
    engine = make(model, parallel, noise)
    return [step_of(engine, step, parallel) for step in range(STEPS)]


def save(engine, step, folder):
    config = MODELS["hybrid"]
    state = dataclasses.replace(STATE, step=step + 1, model=dataclasses.asdict(config))
    save_checkpoint(folder, engine, RunConfig("test", config), state)


def resume(folder, step, parallel, noise=0.3):
    """(loss, gradient norm) of a step from the checkpoint in a folder."""
    engine = make("hybrid", parallel, noise, seed=step)  # what is not loaded shows
    if step > 0:
        load_checkpoint(find_checkpoint(folder), engine)
    return engine, step_of(engine, step, parallel)


def main(folder):
    found, exact = {}, {}
    for layout, parallel in LAYOUTS.items():
        start(parallel)
        for model, used in CASES:
            if used == layout:
                found[f"{model}-{layout}"] = train(model, parallel, NOISE.get(layout, 0.0))
        for model, used in EXACT:
            if used == layout:
                exact[f"{model}-{layout}"] = gradients(model, parallel)
        for step in range(STEPS if layout in RESUMED else 0):
            noise = NOISE.get(layout, 0.0)
            engine, result = resume(folder / layout, step, parallel, noise)
            found.setdefault(f"resumed-{layout}", []).append(result)
            save(engine, step, folder / layout)
    across = []
    for step, layout in enumerate(ACROSS):
        start(LAYOUTS[layout])
        engine, result = resume(folder, step, LAYOUTS[layout])
        across.append(result)
        save(engine, step, folder)
    if dist.get_rank() == 0:
        torch.save(exact, folder / "exact.pt")
        (folder / "found.json").write_text(json.dumps({**found, "across": across}))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
