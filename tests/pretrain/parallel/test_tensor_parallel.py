"""Every mixer and every kind of loop on two tensor-parallel processes against one."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import (
    CheckpointConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from pretrain.config.checks import check_tensor_parallel
from pretrain.model.build import build_model
from pretrain.nn.mixers import registry
from pretrain.parallel.processes import data_parallel_rank_and_size, start_processes
from pretrain.training.engine import Engine
from tests.pretrain.checkpoint.test_checkpoint import STATE
from tests.pretrain.model.test_recursive import KINDS
from tests.pretrain.nn.test_mixers import SMALL
from tests.pretrain.training.test_engine import VOCAB, batches

pytestmark = pytest.mark.usefixtures("processes")
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)
STEPS = 3


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
    found["one-kv-head"] = settings("attn", {"attn": {"num_heads": 4, "num_kv_heads": 1}})
    found["untied"] = settings("attn", {"attn": {"num_heads": 4}}, tie_embeddings=False)
    found["dropout"] = settings("gdn attn", {m: SMALL[m][0] for m in ("gdn", "attn")}, dropout=0.2)
    for name in ("mamba2", "m2rnn", "kda", "gla"):  # with projections that all processes share
        found[f"{name}-lora"] = settings(
            f"2*{name}", {name: SMALL[name][0]}, recursion={"times": 2, "lora_rank": 2}
        )
    for name, recursion in KINDS.items():
        recursion = {**recursion, "backprop_last": None if name == "halting" else 2}
        found[f"recursion-{name}"] = settings(
            "gdn attn para_gru gdn",
            {m: SMALL[m][0] for m in ("gdn", "attn", "para_gru")},
            recursion=recursion,
            block_norm="sandwich",
            scale_embeddings=True,
        )
    return found


def train(config, sequence_parallel=False, checkpointing="none"):
    """(loss, gradient norm) of a few steps."""
    model = build_model(
        config,
        VOCAB,
        seed=0,
        sequence_parallel=sequence_parallel,
        activation_checkpointing=checkpointing,
    )
    engine, results = Engine(model, OPTIMIZER), []
    for step in range(STEPS):
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
RECOMPUTED = ("dropout", "recursion-lora")
LAYOUTS = (2, 1, 2)  # tensor parallel; with 1 the two processes are data-parallel
_WORKER = """
import json, sys
from pathlib import Path
from pretrain.config import ParallelConfig
from pretrain.parallel.processes import is_main_process, start_processes, stop_processes
start_processes(ParallelConfig(tensor=2))
from tests.pretrain.parallel.test_tensor_parallel import (
    ACROSS, LAYOUTS, RECOMPUTED, cases, train, train_across_layouts
)
found = {}
for name, config in cases().items():
    for sequence in (False, True):
        try:
            found[f"{name}{'-sequence' * sequence}"] = train(config, sequence)
        except Exception as error:
            raise RuntimeError(f"{name}, sequence parallel {sequence}") from error
for name in RECOMPUTED:
    for sequence in (False, True):
        key = f"{name}{'-sequence' * sequence}-recomputed"
        found[key] = train(cases()[name], sequence, "block")
for name in ACROSS:
    folder = Path(sys.argv[1]) / name
    found[f"{name}-across"] = train_across_layouts(cases()[name], folder, LAYOUTS)
if is_main_process():
    print("RESULT", json.dumps(found))
stop_processes()
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    script = tmp_path_factory.mktemp("tensor") / "worker.py"
    script.write_text(_WORKER)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
            str(script.parent),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        cwd=Path(__file__).parents[3],
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    found: dict[str, Any] = json.loads(line.removeprefix("RESULT"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", cases())
def test_two_processes_equal_one(name, two_processes):
    expected = train(cases()[name])
    ways = ("", "-sequence", "-recomputed", "-sequence-recomputed")
    for kind in (f"{name}{way}" for way in ways[: 4 if name in RECOMPUTED else 2]):
        assert np.allclose(two_processes[kind], expected, rtol=1e-5), kind


@pytest.mark.slow
@pytest.mark.parametrize("name", ACROSS)
def test_checkpoints_load_under_another_layout(name, two_processes):
    """Tensor-parallel, then data-parallel, then tensor-parallel again, as if on one process."""
    assert np.allclose(two_processes[f"{name}-across"], train(cases()[name]), rtol=1e-5)


@pytest.mark.parametrize(
    ("mixers", "message"),
    [
        ({"gdn": {"num_heads": 6, "head_dim": 4}}, r"does not divide 6 \(.*gdn: num_heads\)"),
        ({"gdn": {"num_heads": 8, "head_dim": 4}}, r"does not divide 2 \(.*: num_kv_heads\)"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_fits(mixers, message):
    attn = {"num_heads": 4, "num_kv_heads": 2}
    config = settings("gdn attn", {**mixers, "attn": attn})
    with pytest.raises(ConfigError, match=f"parallel.tensor is 4, which {message}.*fits 1, 2$"):
        check_tensor_parallel(config, 4, "test")
    check_tensor_parallel(config, 2, "test")
    alone = settings("attn", {"attn": {"num_heads": 4, "num_kv_heads": 1}})
    check_tensor_parallel(alone, 4, "test")
    assert torch.distributed.get_world_size() == 1
