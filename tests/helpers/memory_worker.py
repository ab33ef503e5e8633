"""Run by torchrun: the most memory that a process takes for training steps, by the system's own
count, under several layouts one after another. Prints JSON: {case: [bytes of each process]}."""

import ctypes
import gc
import json
import sys
from pathlib import Path

import numpy as np
import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, ParallelConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_stages
from pretrain.optim.backends.deepspeed import shard_parameters
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    gather,
    is_main_process,
    stop_processes,
)
from pretrain.training.engine import Engine
from pretrain.training.freezing import freeze
from tests.helpers.parallel_worker import start

VOCAB, STEPS = 8192, 2
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
MIXERS = {"gdn": {"num_heads": 4, "head_dim": 64}, "m2rnn": {"num_heads": 16}}


def case(
    pattern,
    *,
    seq_len=512,
    rows=4,
    precision="float32",
    checkpointing="none",
    model=None,
    optimizer="adamw",
    segment_tokens=None,
    freeze=(),
    **parallel,
):
    """A model of width 512 (one with what this test is about in it) under a layout."""
    used = {name: settings for name, settings in MIXERS.items() if name in pattern}
    settings = {"hidden_size": 512, "pattern": pattern, "mixers": used, **(model or {})}
    return {
        "model": settings,
        "parallel": {"micro_batch_size": 1, **parallel},
        "seq_len": seq_len,
        "rows": rows,
        "precision": precision,
        "checkpointing": checkpointing,
        "segment_tokens": segment_tokens,
        "freeze": list(freeze),
        "optimizer": optimizer,
    }


DEEPSPEED = {"zero_backend": "deepspeed"}
LOOP = {"recursion": {"prelude": 1, "coda": 1, "times": 4, "backprop_last": 2, "adapter": True}}
EXPERTS = {"moe": {"num_experts": 8, "top_k": 2, "intermediate_size": 512}}
CASES = {
    "dp2-zero0-checkpointing": case(
        "2*(gdn attn)", zero_stage=0, checkpointing="block", seq_len=1024
    ),
    "dp2-bf16": case("2*(gdn attn)", precision="bf16", model={"hidden_size": 768}),
    "dp2-segments": case("2*(gdn mamba2)", seq_len=4096, rows=2, segment_tokens=512),
    "dp2-muon": case("2*(gdn attn)", optimizer="muon"),
    "dp2-frozen": case("4*gdn", freeze=("embedding", "blocks.[01]", "blocks.3.mlp")),
    "tp2-sequence": case("2*(attn mamba2)", tensor=2, sequence=True, seq_len=1024, rows=2),
    "pp2": case("2*(gdn attn)", pipeline=2, model={"tie_embeddings": False}),
    "ep2": case("2*(gdn attn)", expert=2, model=EXPERTS, seq_len=1024, rows=2),
    "zero3-deepspeed": case("2*(gdn attn)", zero_stage=3, rows=2, **DEEPSPEED),
    "cp2": case("2*(gdn attn)", context=2, seq_len=2048, rows=2),
    "cp2-newton": case("2*(para_gru rat)", context=2, seq_len=2048, rows=2),
}
# On four processes.
FOUR_CASES = {
    "cp4": case("2*(gdn attn)", context=4, seq_len=4096, rows=2),
}


# Not in CI, for their time: give their names.
MORE_CASES = {
    "dp2": case("2*(gdn attn)"),
    "newton": case("2*para_gru m2rnn", seq_len=2048, rows=2),
    "loop": case("attn 2*gdn attn", model=LOOP),
    "segments-attention": case("2*(gdn attn)", seq_len=4096, rows=2, segment_tokens=512),
    "dropout": case("2*(gdn attn)", model={"dropout": 0.2}),
    "cp2-heads": case("2*gru", context=2, seq_len=512, rows=2, context_cells="heads"),
    "zero2-deepspeed": case("2*(gdn attn)", zero_stage=2, **DEEPSPEED),
}


def train(settings, parallel):
    rank, size = data_parallel_rank_and_size()
    rows, seq_len, micro = settings["rows"], settings["seq_len"], parallel.micro_batch_size
    stages = build_stages(
        build_config(ModelConfig, settings["model"], "case"),
        VOCAB,
        seed=0,
        seq_len=seq_len,
        dtype=DTYPES[settings["precision"]],
        sequence_parallel=parallel.sequence,
        activation_checkpointing=settings["checkpointing"],
        context_cells="heads" if parallel.context_cells == "heads" else "chain",
        filled=shard_parameters if parallel.zero_stage == 3 else None,
    )
    for stage in stages:
        stage.segment_tokens = settings["segment_tokens"]
    freeze(stages, settings["freeze"])
    optimizer = OptimizerConfig(kind=settings["optimizer"])
    engine = Engine(stages, optimizer, parallel)
    generator = np.random.default_rng(0)
    for step in range(STEPS):
        engine.begin_step(0, step, rank, size)
        tokens = generator.integers(1, VOCAB, (rows // micro, micro, seq_len + 1))
        engine.train_step([pack_rows(x, eod_id=0) for x in tokens][rank::size], 1e-3)


def own_memory(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def give_back():
    """What this process no longer uses, to the system; the peak starts anew."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main(names):
    found = {}
    for name in names:
        settings = (CASES | FOUR_CASES | MORE_CASES)[name]
        parallel = ParallelConfig(**settings["parallel"])
        start(parallel)
        # A small model first: libraries allocate when they are first used.
        small = {**settings["model"], "hidden_size": 64}
        train({**settings, "model": small, "seq_len": 64}, parallel)
        give_back()
        before = own_memory("VmRSS")
        train(settings, parallel)
        found[name] = gather(own_memory("VmHWM") - before)
        give_back()
    if is_main_process():
        print("measured", json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(sys.argv[1:] or list(CASES))
