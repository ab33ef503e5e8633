"""Trains every mixer and every kind of loop on two tensor-parallel processes.

``torchrun --nproc-per-node 2 -m tests.helpers.tensor_parallel_worker FILE``, see
test_tensor_parallel.py.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from megatron.core import parallel_state

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
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.parallel.processes import (
    data_parallel_rank_and_size,
    is_main_process,
    start_processes,
    stop_processes,
)
from pretrain.training.engine import Engine
from tests.helpers.recursion_kinds import KINDS, UNIVERSAL_BLOCKS
from tests.helpers.small_mixers import SMALL
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import STATE, batches

OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)


STEPS = 2  # more of them are in ACROSS, and in parallel_worker.py under every layout


def settings(pattern, mixers, **changes):
    values = {
        "hidden_size": 24,
        "pattern": pattern,
        "mixers": mixers,
        "mlp": {"ratio": 2},
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def cases():
    """Name to settings: each mixer alone, one key/value head, and loops over a hybrid."""
    found = {name: settings(f"2*{name}", {name: SMALL[name][0]}) for name in registry()}
    found["hgrn-complex"] = settings("2*hgrn", {"hgrn": SMALL["hgrn"][2]})
    found["one-kv-head"] = settings("attn", {"attn": {"num_heads": 4, "num_kv_heads": 1}})
    found["attn-options"] = settings("2*attn", {"attn": SMALL["attn"][-1]})
    found["attn-norms"] = settings("2*attn", {"attn": SMALL["attn"][-2]}, block_norm="post")
    found["one-kv-head-norms"] = settings(
        "attn gdn",
        {"attn": {**SMALL["attn"][-2], "num_kv_heads": 1}, "gdn": SMALL["gdn"][0]},
        block_norms={"attn": "post", "gdn": "sandwich"},
    )
    for count in (1, 2):
        grouped = {**SMALL["gdn"][-1], "num_qk_heads": count}
        found[f"gdn-{count}-qk-heads"] = settings("gdn", {"gdn": grouped})
    found["untied"] = settings("attn", {"attn": {"num_heads": 4}}, tie_embeddings=False)
    found["dropout"] = settings("gdn attn", {m: SMALL[m][0] for m in ("gdn", "attn")}, dropout=0.2)
    for name in ("mamba2", "m2rnn", "kda", "gla"):  # with projections that all processes share
        found[f"{name}-lora"] = settings(
            f"2*{name}", {name: SMALL[name][0]}, recursion={"times": 2, "lora_rank": 2}
        )
    for name, recursion in KINDS.items():
        recursion = {**recursion, "backprop_last": None if "halting" in recursion else 2}
        blocks = UNIVERSAL_BLOCKS if name == "published" else {"block_norm": "sandwich"}
        if name in ("looped", "depth"):
            recursion |= {"exit_weight": 0.3, "exit_distill": name == "depth"}
        found[f"recursion-{name}"] = settings(
            "gdn attn para_gru gdn",
            {m: SMALL[m][0] for m in ("gdn", "attn", "para_gru")},
            recursion=recursion,
            **blocks,
            scale_embeddings=True,
        )
    return found


def train(config, sequence_parallel=False, checkpointing="none", steps=STEPS):
    """(loss, gradient norm) of a few steps."""
    model = build_model(
        config,
        VOCAB,
        seed=0,
        sequence_parallel=sequence_parallel,
        activation_checkpointing=checkpointing,
    )
    engine, results = Engine(model, OPTIMIZER), []
    for step in range(steps):
        engine.begin_step(0, step)
        results.append(engine.train_step(batches(step), 1e-3))
    return [(r.loss, r.grad_norm) for r in results]


def train_across_layouts(config, directory, layouts):
    """One step under each layout of (tensor parallel size), each from the last one's checkpoint."""
    results, path = [], None
    for step, tensor in enumerate(layouts):
        parallel_state.destroy_model_parallel()
        start_processes(ParallelConfig(tensor=tensor))
        rank, size = data_parallel_rank_and_size()
        # Another seed each time: what is not loaded shows.
        engine = Engine(build_model(config, VOCAB, seed=step), OPTIMIZER)
        if path is not None:
            load_checkpoint(path, engine)
        results.append(engine.train_step(batches(step, micro_batch_size=1)[rank::size], 1e-3))
        state = dataclasses.replace(STATE, step=step + 1, model=dataclasses.asdict(config))
        run = RunConfig("test", config, checkpoint=CheckpointConfig(keep_last=9))
        path = save_checkpoint(directory, engine, run, state)
    return [(r.loss, r.grad_norm) for r in results]


ACROSS = ("gdn", "m2rnn-lora", "mamba2-lora", "recursion-lora")


RECOMPUTED = ("dropout", "recursion-lora", "hgrn2", "mamba2")  # trained as checkpointed, too


LAYOUTS = (2, 1, 2)  # tensor parallel; with 1 the two processes are data-parallel


def main(path):
    start_processes(ParallelConfig(tensor=2))
    found = {}
    for name, config in cases().items():
        for sequence in (False, True):
            try:
                found[f"{name}{'-sequence' * sequence}"] = train(config, sequence)
            except Exception as error:
                raise RuntimeError(f"{name}, sequence parallel {sequence}") from error
    for name in RECOMPUTED:
        for sequence in (False, True):
            for kind in ("block", "selective"):
                key = f"{name}{'-sequence' * sequence}-{kind}"
                found[key] = train(cases()[name], sequence, kind)
    for name in ACROSS:
        folder = path.parent / name
        found[f"{name}-across"] = train_across_layouts(cases()[name], folder, LAYOUTS)
    if is_main_process():
        path.write_text(json.dumps(found))
    stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
