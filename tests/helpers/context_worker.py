"""Trains under context parallelism in one launch of four processes; see test_context_parallel.py.

``python -m tests.helpers.context_worker FOLDER [NAME ...]``, on four processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config import CheckpointConfig, OptimizerConfig, ParallelConfig, RunConfig
from pretrain.data.validation import share_of
from pretrain.model.build import build_stages
from pretrain.nn.mixers import Mixer
from pretrain.nn.mixers.over_segments import beyond_segments
from pretrain.parallel.processes import data_parallel_rank_and_size, groups, stop_processes
from pretrain.run_directory import find_checkpoint
from pretrain.training.engine import Engine
from tests.helpers import parallel_worker
from tests.helpers.parallel_worker import settings, start
from tests.helpers.recursion_kinds import KINDS
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import STATE, batches

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)
MUON = dataclasses.replace(OPTIMIZER, kind="muon", ema_decay=0.9, gradient_noise=1e-4)
STEPS, SEQ_LEN, ROWS = 2, 32, 4

MODELS = {
    "hybrid": settings("gdn attn m2rnn swa", tie_embeddings=False, dropout=0.2),
    "recurrent": settings(
        "mamba2 retnet slstm rat",
        scale_embeddings=True,
        z_loss_weight=0.01,
        block_norms={"rat": "post"},
        residual_scale=0.5,
        logit_scale=0.5,
    ),
    "muon": settings(
        "kda attn gru gdn",
        mixers={name: SMALL[name][0] for name in ("kda", "gru")}
        | {"attn": SMALL["attn"][-2], "gdn": SMALL["gdn"][-1]},  # all heads normed, shared keys
    ),
    **{
        f"loop-{kind}": settings("gdn attn gru gdn", recursion=recursion)
        for kind, recursion in KINDS.items()
    },
}
MODELS |= {"block": MODELS["hybrid"], "selective": MODELS["hybrid"]}
MODELS |= dict.fromkeys(("experts", "experts-block"), parallel_worker.MODELS["experts"])
LAYOUTS = {
    "cp4": ParallelConfig(context=4),
    "cp4-ring": ParallelConfig(context=4, context_scans="ring"),
    "cp4-zero0": ParallelConfig(context=4, zero_stage=0),
    "cp2-dp2": ParallelConfig(context=2),
    "cp2-dp2-zero0": ParallelConfig(context=2, zero_stage=0),
    "cp2-tp2": ParallelConfig(context=2, tensor=2),
    "cp2-tp2-sequence": ParallelConfig(context=2, tensor=2, sequence=True),
    "cp2-pp2": ParallelConfig(context=2, pipeline=2),
    "cp4-ep2": ParallelConfig(context=4, expert=2),
    "cp2-ep4": ParallelConfig(context=2, expert=4),
    "cp2-pp2-vpp2": ParallelConfig(context=2, pipeline=2, virtual_pipeline=2),
}
# The same groups of processes again, whose models compute cells over heads.
HEADS = ("cp4", "cp2-tp2-sequence", "cp2-dp2")
LAYOUTS |= {f"{n}-heads": dataclasses.replace(LAYOUTS[n], context_cells="heads") for n in HEADS}
CASES = (
    {f"hybrid-{n}": ("hybrid", n) for n, p in LAYOUTS.items() if p.expert == 1}
    | {
        "block-cp4-heads": ("block", "cp4-heads"),
        f"loop-{next(iter(KINDS))}-cp2-dp2-heads": (f"loop-{next(iter(KINDS))}", "cp2-dp2-heads"),
    }
    | {
        f"{model}-{layout}": (model, layout)
        for model, layouts in {
            "recurrent": ("cp4", "cp4-ring", "cp2-tp2-sequence", "cp2-pp2"),
            "muon": ("cp4", "cp2-dp2-zero0"),
            "block": ("cp4", "cp4-ring", "cp2-pp2", "cp2-tp2-sequence"),
            "selective": ("cp4",),
            "experts": ("cp4", "cp4-ep2", "cp2-ep4", "cp2-tp2-sequence", "cp2-pp2"),
            "experts-block": ("cp2-ep4",),
            **{f"loop-{kind}": ("cp4", "cp2-tp2-sequence") for kind in KINDS},
        }.items()
        for layout in layouts
    }
)
# One step under each layout, each from the checkpoint of the one before.
ACROSS = {
    "hybrid": ["cp4", "tp2", "cp2-tp2-sequence", "cp2-pp2", "dp4", "cp2-dp2-zero0", "alone"],
    "muon": ["cp2-dp2-zero0", "tp2", "cp4", "alone"],
    "experts": ["cp4-ep2", "dp4", "cp2-ep4", "cp2-tp2-sequence"],
}
ALL_LAYOUTS = LAYOUTS | {
    "tp2": ParallelConfig(tensor=2),
    "dp4": ParallelConfig(),
    "alone": ParallelConfig(zero_stage=0),
}
FEWER = {"alone": 1, "tp2": 2}


def make(model: str, parallel: ParallelConfig, seed: int = 0) -> Engine:
    stages = build_stages(
        MODELS[model],
        VOCAB,
        seed=seed,
        seq_len=SEQ_LEN,
        sequence_parallel=parallel.sequence,
        activation_checkpointing=next((k for k in ("block", "selective") if k in model), "none"),
        context_cells="heads" if parallel.context_cells == "heads" else "chain",
    )
    modules = [module for stage in stages for module in stage.modules()]
    cells = [x for x in modules if isinstance(x, Mixer) and x.over_time == "cells"]
    assert all(beyond_segments(x) == (parallel.context_cells == "heads") for x in cells)
    return Engine(stages, MUON if model == "muon" else OPTIMIZER, parallel)


def step_of(engine: Engine, step: int) -> tuple[float, float]:
    rank, size = data_parallel_rank_and_size()
    engine.begin_step(0, step, rank, size)
    parts = batches(step, rows=ROWS, micro_batch_size=1, length=SEQ_LEN)
    result = engine.train_step(parts[rank::size], 1e-3)
    assert result.grad_norm is not None
    return result.loss, result.grad_norm


def train(model: str, parallel: ParallelConfig) -> list[tuple[float, ...]]:
    """Loss and gradient norm of a few steps; behind them validation's loss, targets and bytes, and
    a sum of scores."""
    engine = make(model, parallel)
    results: list[tuple[float, ...]] = [step_of(engine, step) for step in range(STEPS)]
    rank, size = data_parallel_rank_and_size()
    held_out = share_of(batches(99, rows=5, micro_batch_size=1, length=SEQ_LEN), rank, size)
    results.append(engine.validate(held_out, torch.arange(VOCAB)))
    # Whole rows of each process's own, as evaluations in the loop have.
    scores = engine.score(batches(98, rows=2, micro_batch_size=1, length=SEQ_LEN), VOCAB)
    total = torch.stack(scores)[:, 0].sum() if scores else torch.zeros(())
    dist.all_reduce(total, group=groups().get_pipeline_model_parallel_group())
    results.append((float(total),))
    return results


def train_across(model: str, folder: Path) -> list[tuple[float, float]]:
    results = []
    for step, name in enumerate(ACROSS[model]):
        if not start(ALL_LAYOUTS[name], FEWER.get(name)):
            continue
        engine = make(model, ALL_LAYOUTS[name], seed=step)  # what is not loaded shows
        if step > 0:
            load_checkpoint(find_checkpoint(folder), engine)
        results.append(step_of(engine, step))
        config = MODELS[model]
        state = dataclasses.replace(STATE, step=step + 1, model=dataclasses.asdict(config))
        run = RunConfig("test", config, checkpoint=CheckpointConfig(keep_last=9))
        save_checkpoint(folder, engine, run, state)
    return results


def main(folder: Path, wanted: list[str]) -> None:
    found: dict[str, object] = {}
    cases = {name: case for name, case in CASES.items() if not wanted or name in wanted}
    for layout in dict.fromkeys(layout for _, layout in cases.values()):
        parallel = LAYOUTS[layout]
        start(parallel)
        for name, (model, used) in cases.items():
            if used == layout:
                try:
                    found[name] = train(model, parallel)
                except Exception as error:
                    raise RuntimeError(name) from error
    for model in [model for model in ACROSS if not wanted or model in wanted]:
        found[f"across-{model}"] = train_across(model, folder / model)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
