"""Learns from a teacher, and with frozen parameters, under layouts of two processes.

``python -m tests.helpers.distillation_worker FOLDER [NAME ...]``, on two processes; FOLDER has the
teacher's checkpoint. See test_distillation.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.checkpoint_folders import checkpoint_name
from pretrain.config import (
    CheckpointConfig,
    DistillConfig,
    InitializeConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from pretrain.data.teacher_top import TeacherTop
from pretrain.model.build import build_stages
from pretrain.ops.cross_entropy.distillation import TeacherRows, distillation_losses
from pretrain.ops.cross_entropy.likeliest import likeliest
from pretrain.parallel.processes import data_parallel_rank_and_size, stop_processes
from pretrain.training.distilling import learn_from_teacher
from pretrain.training.engine import Engine
from pretrain.training.freezing import freeze
from pretrain.training.initialization import initialize_from
from tests.helpers import parallel_worker
from tests.helpers.parallel_worker import settings, start
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import OPTIMIZER, STATE, batches

STEPS, ALIGNED, SEQ_LEN, ROWS = 5, 2, 32, 4
TEACHER = settings("attn attn attn attn")
MODELS = {
    "same": TEACHER,
    "converted": settings("gdn attn attn gdn"),
    "untied": settings("attn rwkv7 gdn rwkv7", tie_embeddings=False, z_loss_weight=0.01),
    "wider": settings("gdn attn attn gdn", hidden_size=32, logit_softcap=3.0),
    "bf16": settings("gdn attn attn gdn"),
    "frozen": settings("gdn attn m2rnn gdn"),
    "cached": settings("gdn attn gdn"),
    "padded": settings("gdn attn attn gdn"),
    "muon": settings("gdn attn attn gdn"),
    "experts": settings("gdn attn attn gdn", moe=parallel_worker.MODELS["experts"].moe),
}
FROZEN = ["embedding", "blocks.*.mlp", "blocks.1"]
DISTILLED = {
    "same": {"align_steps": 0.0},
    "converted": {"weight": 0.7, "temperature": 2.0},
    "untied": {"weight": 0.4, "reverse": True, "freeze": ["blocks.0"]},
    "wider": {"align_steps": 0.0, "weight": 0.5},
    "bf16": {"weight": 0.7},
    "cached": {"align_steps": 0.0, "weight": 0.6, "cache": "folder"},
    "padded": {"align_steps": 0.0},
    "muon": {"weight": 0.7},
    "experts": {"weight": 0.7},
}
MUON = dataclasses.replace(OPTIMIZER, kind="muon", ema_decay=0.9, gradient_noise=1e-4)
PADDED_ROWS = VOCAB + 14  # of another teacher
LAYOUTS = {
    "tp2": ParallelConfig(tensor=2),
    "tp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2": ParallelConfig(pipeline=2),
    "pp2-vpp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "cp2": ParallelConfig(context=2),
    "dp2": ParallelConfig(),
    "dp2-zero0": ParallelConfig(zero_stage=0),
    "zero2": ParallelConfig(zero_backend="deepspeed", zero_stage=2),
    "zero3": ParallelConfig(zero_backend="deepspeed", zero_stage=3),
    "deepspeed-pp2": ParallelConfig(zero_backend="deepspeed", pipeline=2),
}
CASES = {
    **{f"same-{n}": ("same", n) for n in ("tp2", "tp2-sequence", "pp2", "cp2", "dp2")},
    **{f"converted-{n}": ("converted", n) for n in LAYOUTS},
    **{f"untied-{n}": ("untied", n) for n in ("tp2-sequence", "pp2", "cp2")},
    **{f"wider-{n}": ("wider", n) for n in ("tp2", "pp2")},
    "bf16-pp2": ("bf16", "pp2"),
    **{f"cached-{n}": ("cached", n) for n in ("tp2-sequence", "pp2", "cp2")},
    "padded-tp2": ("padded", "tp2"),
    "muon-dp2": ("muon", "dp2"),
    **{f"frozen-{n}": ("frozen", n) for n in ("tp2", "pp2", "dp2", "zero2", "zero3")},
}


RESUMED = ("dp2", "pp2", "zero2", "zero3")


def run_of(model: str, parallel: ParallelConfig, teacher: Path) -> RunConfig:
    distill = None
    if model == "padded":
        teacher = teacher.with_name("padded")
    if model in DISTILLED:
        given = {"align_steps": ALIGNED / STEPS, **cast(Any, DISTILLED[model])}
        distill = DistillConfig(str(teacher), **given)
    train = TrainConfig(steps=STEPS, seq_len=SEQ_LEN, freeze=FROZEN if model == "frozen" else [])
    config = MODELS[model]
    optimizer = MUON if model == "muon" else OPTIMIZER
    return RunConfig(
        "test", config, distill=distill, train=train, optimizer=optimizer, parallel=parallel
    )


def make(
    model: str,
    parallel: ParallelConfig,
    teacher: Path,
    at_once: int | None = None,
    seed: int = 3,
) -> Engine:
    run = run_of(model, parallel, teacher)
    dtype = torch.bfloat16 if model == "bf16" else torch.float32
    stages = build_stages(
        run.model,
        VOCAB,
        seed=seed,
        seq_len=SEQ_LEN,
        dtype=dtype,
        sequence_parallel=parallel.sequence,
        activation_checkpointing="block" if model == "untied" else "none",
    )
    if model == "same":
        initialize_from(stages, InitializeConfig(str(teacher)))
    freeze(stages, run.frozen)
    data: Any = SimpleNamespace(
        tokenizer=SimpleNamespace(sha256=STATE.tokenizer_sha256, vocab_size=VOCAB - 3)
    )
    recipe = None if run.distill is None else learn_from_teacher(stages, run, data)
    for stage in stages:
        if at_once is not None:
            stage.logits_at_once = at_once * VOCAB
    engine = Engine(stages, run.optimizer, parallel)
    engine.recipe = recipe
    return engine


def said(number: int) -> TeacherTop:
    """What no teacher said of a micro-batch's tokens."""
    draw = torch.Generator().manual_seed(number)
    log_probs = torch.randn(1, SEQ_LEN, 7, generator=draw).log_softmax(-1)
    ids = torch.rand(1, SEQ_LEN, VOCAB - 3, generator=draw).topk(6, -1)[1]
    return TeacherTop(ids, log_probs[..., :-1], log_probs[..., -1])


def step_of(engine: Engine, step: int) -> tuple[float, float | None]:
    rank, size = data_parallel_rank_and_size()
    engine.begin_step(0, step, rank, size)
    parts = batches(step, rows=ROWS, micro_batch_size=1, length=SEQ_LEN)
    for number, batch in enumerate(parts):
        batch.top = said(ROWS * step + number)  # which only a student without a teacher looks at
    result = engine.train_step(parts[rank::size], 1e-3)
    return result.loss, result.grad_norm


def weights(engine: Engine) -> dict[str, list[bytes]]:
    """What this process has of every weight."""
    return {
        name: [x.contiguous().view(torch.uint8).numpy().tobytes() for x in boxes.parts.values()]
        for name, boxes in engine.backend.weights_state(saving=False).items()
    }


def teacher_sha256(engine: Engine) -> str:
    digest = hashlib.sha256()
    for part in engine.parts:
        teacher = None if part.distilled is None else part.distilled.teacher
        for name, parameter in [] if teacher is None else teacher.named_parameters():
            digest.update(name.encode())
            digest.update(parameter.detach().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def train(model: str, parallel: ParallelConfig, teacher: Path, **options: Any) -> dict[str, Any]:
    """Loss and gradient norm of every step, and which weights had changed after which of them."""
    engine = make(model, parallel, teacher, **options)
    before, hashed = weights(engine), teacher_sha256(engine)
    results: list[tuple[float | None, ...]] = []
    changed = []
    for step in range(STEPS):
        results.append(step_of(engine, step))
        engine.backend.gather_weights()
        now = weights(engine)
        changed.append(sorted(name for name in now if now[name] != before[name]))
    results.append(engine.validate(batches(99, rows=2, micro_batch_size=1, length=SEQ_LEN))[:1])
    return {
        "results": results,
        "changed": changed,
        "teacher": teacher_sha256(engine) == hashed,
        "metrics": engine.layer_metrics(),
    }


def resumed(model: str, parallel: ParallelConfig, teacher: Path, folder: Path) -> dict[str, Any]:
    """Losses and gradient norms of a run, and of what goes on from checkpoints in it."""
    engine, whole, others = make(model, parallel, teacher), [], {}
    run = run_of(model, parallel, teacher)
    run.checkpoint.keep_last = 9
    for step in range(STEPS):
        whole.append(step_of(engine, step))
        state = dataclasses.replace(
            STATE,
            step=step + 1,
            model=dataclasses.asdict(run.model),
            aligned=min(step + 1, ALIGNED),
        )
        save_checkpoint(folder, engine, run, state)
    for done in (1, ALIGNED + 1):
        engine = make(model, parallel, teacher, seed=9)
        load_checkpoint(folder / checkpoint_name(done), engine)
        others[done] = [step_of(engine, step) for step in range(done, STEPS)]
    return {"whole": whole, "resumed": others}


def sharded_errors() -> list[float]:
    """Errors of values and gradients by shards, in float64; of padded rows one has none to show."""
    draw = torch.Generator().manual_seed(5)
    shapes = [(9, 5), (24, 5), (9, 7), (24, 7)]
    x, weight, its_x, its_weight = (torch.randn(s, generator=draw).double() for s in shapes)
    targets, upstream = torch.arange(9) * 2, torch.randn(2, 9, generator=draw).double()
    group = dist.group.WORLD
    here = slice(12 * dist.get_rank(), 12 * dist.get_rank() + 12)
    found = []
    for vocabulary, reverse in ((19, False), (19, True), (11, False), (11, True)):
        top = likeliest(its_x, its_weight, 5, tokens_at_once=4, vocabulary=vocabulary)
        for cached in (False, True):
            errors = []
            results = []
            for rows, shards in ((slice(None), None), (here, group)):
                own_x, own_weight = (t.clone().requires_grad_() for t in (x, weight[rows]))
                teacher = top if cached else TeacherRows(its_x, its_weight[rows])
                losses = distillation_losses(
                    own_x,
                    own_weight,
                    targets,
                    teacher,
                    tokens_at_once=4,
                    vocabulary=vocabulary,
                    temperature=1.5,
                    reverse=reverse,
                    group=shards,
                )
                d_x, d_weight = torch.autograd.grad(losses, (own_x, own_weight), upstream)
                if shards is not None:
                    dist.all_reduce(d_x)
                results.append((losses.detach(), d_x, d_weight if shards else d_weight[here]))
            for one, other in zip(*results, strict=True):
                errors.append(float((one - other).abs().max()))
            found.append(max(errors))
    return found


def write_teacher(folder: Path, config: ModelConfig = TEACHER, rows: int = VOCAB) -> Path:
    """Save a teacher that is not as it was drawn; on one process."""
    engine = Engine(build_stages(config, rows, seed=1, seq_len=SEQ_LEN), OPTIMIZER)
    with torch.no_grad():
        for part in engine.parts:
            for parameter in part.parameters():
                parameter.mul_(1.5)
    state = dataclasses.replace(STATE, model=dataclasses.asdict(config), vocab_size=rows)
    run = RunConfig("teacher", config, checkpoint=CheckpointConfig(keep_last=1))
    save_checkpoint(folder, engine, run, state)
    return folder


def main(folder: Path, wanted: list[str]) -> None:
    found: dict[str, Any] = {}
    cases = {name: case for name, case in CASES.items() if not wanted or name in wanted}
    for layout in dict.fromkeys(layout for _, layout in cases.values()):
        parallel = LAYOUTS[layout]
        start(parallel)
        if layout == "tp2":
            found["sharded"] = sharded_errors()
        if not wanted and layout in RESUMED:
            at = folder / layout
            found[f"resumed-{layout}"] = resumed("converted", parallel, folder / "teacher", at)
        for name, (model, used) in cases.items():
            if used == layout:
                try:
                    found[name] = train(model, parallel, folder / "teacher", at_once=7)
                except Exception as error:
                    raise RuntimeError(name) from error
    rank = os.environ["RANK"]
    (folder / f"results-{rank}.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
