"""Write a 1B model's first checkpoint under one layout and read it under another, on a CPU.

``OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 benchmarks/checkpoint_1b_cpu.py [FOLDER]`` takes
20 GB of memory and 14 GB of disk. Weights and optimizer state get values that depend on their names
alone, so that what is read can be compared with what it must be, bit by bit.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from pretrain.checkpoint.state import CheckpointState, check_files, load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.config_loader import build_config
from pretrain.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from pretrain.model.build import build_stages
from pretrain.nn.parameters import draw_like
from pretrain.parallel.processes import gather, is_main_process, stop_processes
from pretrain.training.engine import Engine
from pretrain.training.metrics import peak_memory_bytes
from tests.helpers.parallel_worker import start

MODEL = Path("configs/models/1b/gdn-hybrid-3to1.yaml")
WRITE = ParallelConfig(tensor=2, sequence=True)
READ = ParallelConfig(pipeline=2)
KEYS = ("exp_avg", "exp_avg_sq")


def engine_under(parallel: ParallelConfig, config: ModelConfig, seed: int) -> Engine:
    start(parallel)
    stages = build_stages(
        config,
        config.vocab_size or 0,
        seed=seed,
        seq_len=4096,
        dtype=torch.bfloat16,
        sequence_parallel=parallel.sequence,
    )
    return Engine(stages, OptimizerConfig(), parallel)


def state_of(engine: Engine) -> Any:
    """Yield (name, key, optimizer tensor, expected values) of all local optimizer state."""
    updates: Any = engine.backend
    for name, parameter, index, main, first in updates._mains():
        tensors = updates._tensors(index, main)
        for key in KEYS:
            wanted = draw_like(parameter, 1.0, f"{key}:{name}").view(-1)
            wanted = wanted if first is None else wanted[first : first + main.numel()]
            yield name, key, tensors[key].view(-1), wanted


def main(folder: Path) -> None:
    config = build_config(ModelConfig, yaml.safe_load(MODEL.read_text())["model"], str(MODEL))
    engine = engine_under(WRITE, config, seed=1)
    elements = 0
    for _, _, tensor, wanted in state_of(engine):
        tensor.copy_(wanted)
        elements += tensor.numel()
    state = CheckpointState(
        step=1,
        tokens=0,
        seed=1,
        skipped=0,
        vocab_size=config.vocab_size or 0,
        precision="bf16",
        tokenizer_sha256="0" * 64,
        data=["none"],
        model=dataclasses.asdict(config),
    )
    run = RunConfig("1b", config, checkpoint=CheckpointConfig(background=False))
    began = time.monotonic()
    path = save_checkpoint(folder, engine, run, state)
    written = time.monotonic() - began
    size = sum(entry["size"] for entry in json.loads((path / "files.json").read_text()).values())
    peak_writing = max(gather(peak_memory_bytes()))
    del engine
    gc.collect()

    engine = engine_under(READ, config, seed=2)
    began = time.monotonic()
    check_files(path)
    checked = time.monotonic() - began
    load_checkpoint(path, engine)
    read = time.monotonic() - began
    wrong = compared = 0
    for name, key, tensor, wanted in state_of(engine):
        compared += tensor.numel()
        if not torch.equal(tensor, wanted):
            wrong += 1
            print(f"different: {key} of {name}")
    weights = {n: p.detach().clone() for part in engine.parts for n, p in part.named_parameters()}
    del engine
    gc.collect()
    stages = build_stages(
        config, config.vocab_size or 0, seed=1, seq_len=4096, dtype=torch.bfloat16
    )
    for stage in stages:
        for name, parameter in stage.named_parameters():
            compared += parameter.numel()
            if not torch.equal(parameter, weights[name]):
                wrong += 1
                print(f"different: {name}")
    wrong, compared = sum(gather(wrong)), sum(gather(compared))
    if is_main_process():
        print(
            f"{MODEL}, bf16: {size / 1e9:.2f} GB written under tensor 2 x sequence in "
            f"{written:.0f} s, including sha256;\nhashes checked in {checked:.0f} s and read under "
            f"pipeline 2 in {read - checked:.0f} s; {compared:,} numbers compared, {wrong} tensors "
            f"different; largest peak memory of a process {peak_writing / 1e9:.1f} GB"
        )
    stop_processes()
    if wrong:
        raise SystemExit(1)


if __name__ == "__main__":
    given = sys.argv[1] if len(sys.argv) > 1 else None
    target = Path(given or Path(tempfile.gettempdir()) / "checkpoint-1b")
    try:
        main(target)
    finally:
        if given is None:
            shutil.rmtree(target, ignore_errors=True)
