"""Trains models under many layouts in one launch of four processes; see test_parallel_layouts.py.

``torchrun --nproc-per-node 4 -m tests.helpers.parallel_worker FOLDER [NAME ...]``
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.config_loader import build_config
from pretrain.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from pretrain.data.validation import share_of
from pretrain.model.build import build_stages
from pretrain.model.float8 import multiply_in_float8
from pretrain.optim.backends.deepspeed import shard_parameters
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    start_processes,
    stop_processes,
)
from pretrain.run_directory import find_checkpoint
from pretrain.training.engine import Engine
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import STATE, batches

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)
OPTIMIZERS = {
    "options": dataclasses.replace(OPTIMIZER, ema_decay=0.9, gradient_noise=1e-4),
}
OPTIMIZERS |= dict.fromkeys(
    ("muon", "muon-bf16", "muon-experts"),
    dataclasses.replace(OPTIMIZER, kind="muon", ema_decay=0.9),
)
# The second step has both momenta of the first; validation sees what it has updated.
STEPS, SEQ_LEN = 2, 32


# Newton's method stops at 1e-5 by itself, and how far below depends on what is solved together.
EXACT = {name: {"tolerance": 1e-6} for name in ("para_gru", "para_lstm")}


def settings(pattern, **changes):
    names = dict.fromkeys(pattern.split())
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mlp": {"ratio": 2},
        "mixers": {name: SMALL[name][0] | EXACT.get(name, {}) for name in names},
        **changes,
    }
    return build_config(ModelConfig, values, "test")


OPTIONS = {"mup_base_hidden_size": 12, "logit_softcap": 2.0, "z_loss_weight": 0.01, "dropout": 0.2}
MODELS = {
    "tied": settings(
        "gdn attn m2rnn gdn",
        scale_embeddings=True,
        embedding_scale=1.5,
        residual_scale=0.4,
        logit_scale=0.7,
    ),
    "bf16": settings("gdn attn m2rnn gdn"),
    "untied": settings("para_gru attn mamba2 delta_product", tie_embeddings=False),
    # One process computes the loss at once, several piece by piece.
    "pieces": settings("kda swa lstm hgrn2", block_norm="sandwich", block_norms={"swa": "post"}),
    "options": settings("gdn attn kda gla", depth_scaled_init=True, **OPTIONS),
    "muon": settings(
        "gdn attn m2rnn gdn",
        tie_embeddings=False,
        mixers={
            "gdn": SMALL["gdn"][-1],  # shared keys
            "attn": {"num_heads": 4, "qk_norm": True, "qk_norm_over": "width"},
            "m2rnn": SMALL["m2rnn"][0],
        },
    ),
    "experts": settings(
        "gdn attn attn gdn",
        moe={
            "num_experts": 4,
            "top_k": 2,
            "intermediate_size": 16,
            "shared_intermediate_size": 16,
            "shared_gate": True,
            "first_dense": 1,
            "balance_weight": 0.1,
            "z_loss_weight": 0.01,
            "bias_update_rate": 0.01,
        },
    ),
    "loop": settings(
        "attn gdn para_gru gdn",
        dropout=0.2,
        recursion={
            "prelude": 1,
            "coda": 2,
            "times": 2,
            "lora_rank": 2,
            "step_signal": "learned",
        },
    ),
    "depth": settings(
        "gdn attn gdn",
        recursion={
            "prelude": 1,
            "coda": 1,
            "times": 3,
            "adapter": True,
            "sampling": "poisson",
            "state_init": "random",
            "backprop_last": 2,
            "normalize_state": True,
            "exit_weight": 0.3,
            "exit_distill": True,
        },
    ),
    # Micro-batches of a step are of two lengths.
    "lengths": settings("gdn attn swa gdn"),
    "capacity": settings(
        "gdn attn attn gdn",
        moe={"num_experts": 4, "top_k": 2, "intermediate_size": 16, "capacity_factor": 0.6},
    ),
}
MODELS["muon-bf16"], MODELS["muon-experts"] = MODELS["muon"], MODELS["experts"]
# With selective activation checkpointing.
MODELS["selective"] = settings("gdn attn m2rnn hgrn2", block_norm="sandwich", dropout=0.2)
# Blocks of one kind share a table.
MODELS["tables"] = MODELS["tables-bf16"] = settings(
    "hgrn2 attn hgrn2 hgrn2",
    mixers={"attn": {"num_heads": 4}, "hgrn2": {"head_dim": 4, "lower_bound": "shared"}},
)
# Of widths that are multiples of 16 on two processes, too.
WIDE = {"gdn": {"head_dim": 32}, "attn": {"num_heads": 4}, "m2rnn": {"num_heads": 4}}
MODELS["fp8"] = MODELS["fp8-selective"] = settings(
    "gdn attn m2rnn gdn", hidden_size=64, mlp={"ratio": 2}, mixers=WIDE
)
LAYOUTS = {
    "tp2-pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2-pp2-sequence": ParallelConfig(tensor=2, pipeline=2, sequence=True),
    "pp2-vpp2-dp2": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "pp4": ParallelConfig(pipeline=4),
    "tp2-dp2-sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2-dp2-zero0": ParallelConfig(pipeline=2, zero_stage=0),
    "dp4-zero0": ParallelConfig(zero_stage=0),
    "dp4": ParallelConfig(),
    "deepspeed-dp4-zero0": ParallelConfig(zero_backend="deepspeed", zero_stage=0),
    "deepspeed-dp4-zero2": ParallelConfig(zero_backend="deepspeed", zero_stage=2),
    "deepspeed-dp4-zero3": ParallelConfig(zero_backend="deepspeed", zero_stage=3),
    "deepspeed-dp4-zero2-offload": ParallelConfig(
        zero_backend="deepspeed", zero_stage=2, offload="cpu"
    ),
    "deepspeed-dp4-zero1-offload": ParallelConfig(zero_backend="deepspeed", offload="cpu"),
    "deepspeed-dp4-zero3-offload": ParallelConfig(
        zero_backend="deepspeed", zero_stage=3, offload="cpu"
    ),
    "deepspeed-tp2-dp2-zero1-sequence": ParallelConfig(
        zero_backend="deepspeed", tensor=2, sequence=True
    ),
    "deepspeed-tp2-dp2-zero2-sequence": ParallelConfig(
        zero_backend="deepspeed", zero_stage=2, tensor=2, sequence=True
    ),
    "deepspeed-tp2-dp2-zero3": ParallelConfig(zero_backend="deepspeed", zero_stage=3, tensor=2),
    "deepspeed-tp2-dp2-zero3-sequence": ParallelConfig(
        zero_backend="deepspeed", zero_stage=3, tensor=2, sequence=True
    ),
    "deepspeed-pp2-vpp2-dp2": ParallelConfig(
        zero_backend="deepspeed", pipeline=2, virtual_pipeline=2
    ),
    "deepspeed-tp2-pp2-sequence": ParallelConfig(
        zero_backend="deepspeed", tensor=2, pipeline=2, sequence=True
    ),
}
EXPERT_LAYOUTS = {
    "ep2-dp4": ParallelConfig(expert=2),
    "ep4-zero0": ParallelConfig(expert=4, zero_stage=0),
    "tp2-sequence-ep4": ParallelConfig(tensor=2, sequence=True, expert=4),
    "tp2-sequence-dp2": ParallelConfig(tensor=2, sequence=True),
    "pp2-ep2": ParallelConfig(pipeline=2, expert=2),
    "dp4-zero0": ParallelConfig(zero_stage=0),
}
OPTION_LAYOUTS = [
    "tp2-pp2-sequence",
    "dp4",
    "dp4-zero0",
    "deepspeed-dp4-zero3",
    "deepspeed-tp2-dp2-zero1-sequence",
]
LENGTHS_LAYOUTS = (
    "tp2-pp2",
    "pp4",
    "pp2-vpp2-dp2",
    "dp4",
    "dp4-zero0",
    "deepspeed-dp4-zero2",
    "deepspeed-tp2-pp2-sequence",
)
FLOAT8_LAYOUTS = (
    *("tp2-pp2-sequence", "tp2-dp2-sequence", "pp2-vpp2-dp2", "dp4", "deepspeed-dp4-zero2"),
    *("deepspeed-dp4-zero3", "deepspeed-tp2-dp2-zero3-sequence"),
)
TABLE_LAYOUTS = (
    *("tp2-pp2-sequence", "pp2-vpp2-dp2", "pp4", "dp4"),
    *("deepspeed-dp4-zero3", "deepspeed-pp2-vpp2-dp2"),
)
SELECTIVE_LAYOUTS = ("tp2-pp2-sequence", "deepspeed-dp4-zero3")
MUON_LAYOUTS = {
    "pp2-dp2-zero0": ParallelConfig(pipeline=2, zero_stage=0),
    "tp2-pp2-sequence-zero0": ParallelConfig(tensor=2, pipeline=2, sequence=True, zero_stage=0),
    "tp2-dp2-zero0": ParallelConfig(tensor=2, zero_stage=0),
}
# Three hybrids and a loop are trained under each of these, the first of them under every layout.
EVERYWHERE = ("tied", "untied", "pieces", "loop")
MAIN_LAYOUTS = (
    "tp2-pp2",
    "pp2-vpp2-dp2",
    "dp4",
    "deepspeed-dp4-zero2",
    "deepspeed-dp4-zero3",
    "tp2-dp2-sequence",
)
# The others in turn, under every eighth.
_MODELS, _LAYOUTS = list(MODELS), list(LAYOUTS)
# Not: stages that a model does not have ("depth" is one block and the rest); what is refused.
CASES = {
    f"{model}-{layout}": (model, layout)
    for model in MODELS
    for layout, parallel in LAYOUTS.items()
    if model not in ("capacity", "lengths", "selective", "fp8", "fp8-selective")
    and not model.endswith("experts")
    and not model.startswith(("muon", "tables"))
    and (
        model in ("tied", "options")
        or (model in EVERYWHERE and layout in MAIN_LAYOUTS)
        or (_MODELS.index(model) + _LAYOUTS.index(layout)) % 8 == 0
    )
    and (model != "options" or layout in OPTION_LAYOUTS)
    and (model != "depth" or parallel.pipeline * parallel.virtual_pipeline <= 2)
    and (model != "bf16" or layout != "deepspeed-dp4-zero0")
}
CASES.update({f"experts-{layout}": ("experts", layout) for layout in EXPERT_LAYOUTS})
CASES.update(
    {
        f"capacity-{layout}": ("capacity", layout)
        for layout, parallel in EXPERT_LAYOUTS.items()
        if parallel.tensor == 1
    }
)
CASES.update({f"lengths-{layout}": ("lengths", layout) for layout in LENGTHS_LAYOUTS})
CASES.update({f"muon-{layout}": ("muon", layout) for layout in MUON_LAYOUTS})
CASES.update({f"fp8-{layout}": ("fp8", layout) for layout in FLOAT8_LAYOUTS})
CASES.update({f"tables-{layout}": ("tables", layout) for layout in TABLE_LAYOUTS})
CASES["tables-bf16-deepspeed-dp4-zero3"] = ("tables-bf16", "deepspeed-dp4-zero3")
for _model in ("selective", "fp8-selective"):
    CASES.update({f"{_model}-{layout}": (_model, layout) for layout in SELECTIVE_LAYOUTS})
# Under ZeRO-1 whole matrices are dealt out, of two dtypes and of experts too.
CASES.update(
    {
        f"{model}-{layout}": (model, layout)
        for model, layouts in {
            "muon": ("dp4", "dp4-zero0", "tp2-dp2-sequence", "pp2-vpp2-dp2"),
            "muon-bf16": ("dp4", "dp4-zero0", "tp2-dp2-sequence"),
            "muon-experts": ("ep2-dp4", "tp2-sequence-dp2", "pp2-ep2", "dp4-zero0"),
        }.items()
        for layout in layouts
    }
)
# Of fewer processes than there are, the rest of which wait.
FEWER = {"alone": 1, "dp2": 2, "tp2": 2}
# Layouts of the same name are the same.
ALL_LAYOUTS = (
    LAYOUTS
    | EXPERT_LAYOUTS
    | MUON_LAYOUTS
    | {"alone": ParallelConfig(), "dp2": ParallelConfig(), "tp2": ParallelConfig(tensor=2)}
)
ACROSS_ROWS = 4  # of a step of these
# One step under each layout, each from the checkpoint of the one before.
ACROSS = {
    "resharded-tied": (
        "tied",
        ["tp2-pp2", "alone", "dp2", "tp2", "dp4", "pp2-vpp2-dp2", "tp2-dp2-sequence"],
    ),
    "resharded-untied": (
        "untied",
        [
            "deepspeed-dp4-zero3",
            "tp2-pp2",
            "deepspeed-dp4-zero2-offload",
            "dp4-zero0",
            "deepspeed-dp4-zero3-offload",
            "deepspeed-tp2-dp2-zero3",
            "dp4",
            "deepspeed-pp2-vpp2-dp2",
            "deepspeed-dp4-zero0",
        ],
    ),
    "resharded-bf16": (
        "bf16",
        [
            "tp2-pp2",
            "deepspeed-dp4-zero3",
            "deepspeed-dp4-zero2",
            "pp2-vpp2-dp2",
            "dp4-zero0",
        ],
    ),
    "resharded-fp8": ("fp8", ["deepspeed-dp4-zero3", "tp2-pp2", "dp4"]),
    "resharded-tables": (
        "tables",
        ["pp2-vpp2-dp2", "deepspeed-dp4-zero3", "deepspeed-pp2-vpp2-dp2", "tp2-pp2-sequence"],
    ),
    "resharded-experts": (
        "experts",
        ["ep2-dp4", "tp2-sequence-ep4", "dp4-zero0", "pp2-ep2", "ep4-zero0"],
    ),
    "resharded-options": ("options", ["tp2-pp2-sequence", "dp4", "dp4-zero0"]),
    "resharded-muon": (
        "muon",
        [
            "tp2-pp2-sequence-zero0",
            "dp4",
            "pp2-dp2-zero0",
            "dp2",
            "alone",
            "tp2-dp2-sequence",
            "dp4-zero0",
            "pp2-vpp2-dp2",
        ],
    ),
    "resharded-muon-bf16": ("muon-bf16", ["dp4", "dp4-zero0", "dp2", "tp2-dp2-sequence"]),
    "resharded-muon-experts": ("muon-experts", ["ep2-dp4", "dp4-zero0", "pp2-ep2"]),
    "resharded-loop": (
        "loop",
        [
            "tp2-pp2",
            "alone",
            "dp2",
            "tp2",
            "pp2-vpp2-dp2",
            "pp2-dp2-zero0",
            "tp2-pp2-sequence",
            "dp4-zero0",
        ],
    ),
}


_LAYOUT_NUMBERS = itertools.count()


def start(parallel, size=None):
    """Groups for this layout, and no others: every gloo group has threads of its own, and a hundred
    of them leave nothing to the work. Returns whether this process is one of the first ``size``;
    the others join no group."""
    stop_processes()
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    size = size or count
    # Keys of an earlier layout must not be found.
    prefix = f"layout-{next(_LAYOUT_NUMBERS)}"
    if rank >= size:
        return False
    store = dist.TCPStore(host, port, count, is_master=False)
    prefixed = dist.PrefixStore(prefix, store)
    dist.init_process_group("gloo", store=prefixed, rank=rank, world_size=size)
    start_processes(parallel)
    return True


def make(model, parallel, seed=0):
    stages = build_stages(
        MODELS[model],
        VOCAB,
        seed=seed,
        seq_len=SEQ_LEN,
        sequence_parallel=parallel.sequence,
        dtype=torch.bfloat16 if model.endswith("bf16") or "fp8" in model else torch.float32,
        filled=shard_parameters if parallel.zero_stage == 3 else None,
        activation_checkpointing="selective" if "selective" in model else "none",
    )
    if "fp8" in model:
        for stage in stages:
            multiply_in_float8(stage, stage.context)
    if model == "pieces" and dist.get_world_size() > 1:
        for stage in stages:
            stage.logits_at_once = 7 * VOCAB
    optimizer = OPTIMIZERS.get(model, OPTIMIZER)
    if parallel.zero_backend == "deepspeed":
        optimizer = OPTIMIZER
    return Engine(stages, optimizer, parallel)


def rows_of(parallel):
    """Sequences of a step, one to a micro-batch: several to each process."""
    return 8 if parallel.model_size == 1 or parallel.virtual_pipeline > 1 else 4


def step_of(engine, step, rows, lengths=(SEQ_LEN,)):
    rank, size = data_parallel_rank_and_size()
    engine.begin_step(0, step, rank, size)
    each = rows // len(lengths)
    parts = [b for n in lengths for b in batches(step, rows=each, micro_batch_size=1, length=n)]
    result = engine.train_step(parts[rank::size], 1e-3)
    return result.loss, result.grad_norm


def train(model, parallel, rows):
    """(loss, gradient norm) of a few steps, and the validation loss behind them."""
    engine = make(model, parallel)
    lengths = (SEQ_LEN, 16) if model == "lengths" else (SEQ_LEN,)
    results = [step_of(engine, step, rows, lengths) for step in range(STEPS)]
    rank, size = data_parallel_rank_and_size()
    # Neither as many for each process nor a multiple of a pipeline's stages.
    held_out = share_of(batches(99, rows=5, micro_batch_size=1), rank, size)
    return [*results, engine.validate(held_out)]


def train_across(model, names, folder):
    config, results = MODELS[model], []
    for step, name in enumerate(names):
        if not start(ALL_LAYOUTS[name], FEWER.get(name)):
            continue
        engine = make(model, ALL_LAYOUTS[name], seed=step)  # what is not loaded shows
        if step > 0:
            load_checkpoint(find_checkpoint(folder), engine)
        results.append(step_of(engine, step, ACROSS_ROWS))
        state = dataclasses.replace(STATE, step=step + 1, model=dataclasses.asdict(config))
        optimizer = OPTIMIZERS.get(model, OPTIMIZER)
        run = RunConfig(
            "test", config, optimizer=optimizer, checkpoint=CheckpointConfig(keep_last=9)
        )
        save_checkpoint(folder, engine, run, state)
    return results


def main(folder, wanted):
    found = {}
    for layout, parallel in ALL_LAYOUTS.items():
        if not any(
            used == layout and (not wanted or n in wanted) for n, (_, used) in CASES.items()
        ):
            continue
        start(parallel)
        for name, (model, used) in CASES.items():
            if used == layout and (not wanted or name in wanted):
                try:
                    found[name] = train(model, parallel, rows_of(parallel))
                except Exception as error:
                    raise RuntimeError(name) from error
    for name, (model, layouts) in ACROSS.items():
        if not wanted or name in wanted:
            found[name] = train_across(model, layouts, folder / name)
    if os.environ["RANK"] == "0":
        (folder / "results.json").write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
