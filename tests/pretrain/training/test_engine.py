"""The engine against a plain torch loop, on one process and on two."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.nn.parameters import info_of
from pretrain.training.engine import Engine
from tests.pretrain.model.test_language_model import VOCAB, settings

pytestmark = pytest.mark.usefixtures("processes")
OPTIMIZER = OptimizerConfig(lr=1e-3, weight_decay=0.2, clip_grad=0.5)
STEPS = 3


def batches(step, rows=4, micro_batch_size=2):
    generator = np.random.default_rng(step)
    tokens = generator.integers(0, VOCAB, (rows, 33))
    return [
        pack_rows(tokens[i : i + micro_batch_size], eod_id=7)
        for i in range(0, rows, micro_batch_size)
    ]


def plain_loop(model, micro_batch_size=2):
    """Losses and gradient norms of a loop with nothing but torch."""
    groups = [
        {"params": [p for p in model.parameters() if info_of(p).weight_decay], "weight_decay": 0.2},
        {
            "params": [p for p in model.parameters() if not info_of(p).weight_decay],
            "weight_decay": 0.0,
        },
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        parts = batches(step, micro_batch_size=micro_batch_size)
        count = sum(int(b.loss_mask.sum()) for b in parts)
        total = 0.0
        for b in parts:
            loss = (model(b.tokens, b.targets, sequences=b.sequences) * b.loss_mask).sum()
            (loss / count).backward()
            total += loss.item() / count
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        results.append((total, float(norm)))
    return results


def engine_loop(model, micro_batch_size=2):
    engine = Engine(model, OPTIMIZER)
    results = [
        engine.train_step(batches(step, micro_batch_size=micro_batch_size), 1e-3)
        for step in range(STEPS)
    ]
    return [(r.loss, r.grad_norm) for r in results]


def make(dtype=torch.float32):
    return build_model(settings(init_std=0.05), VOCAB, seed=0, dtype=dtype)


def test_equals_a_plain_torch_loop():
    ours, plain = make(), make()
    assert np.allclose(engine_loop(ours), plain_loop(plain), rtol=1e-5)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name


def test_gradient_accumulation_changes_nothing():
    assert np.allclose(engine_loop(make(), 1), engine_loop(make(), 4), rtol=1e-5)


def test_bf16_keeps_float32_masters():
    """An update too small for bf16 still moves the weights after many steps."""
    narrow, wide = engine_loop(make(torch.bfloat16)), engine_loop(make())
    assert np.allclose([loss for loss, _ in narrow], [loss for loss, _ in wide], rtol=3e-2)
    assert narrow[0][1] == pytest.approx(wide[0][1], rel=3e-2)
    model = make(torch.bfloat16)
    before = model.final_norm.weight.clone()
    engine = Engine(model, OptimizerConfig(lr=1.0, weight_decay=0.0))
    for _ in range(8):
        engine.train_step(batches(0), 1e-3)  # bf16 steps around 1 are 2^-8 = 4e-3 below it
    assert not torch.equal(model.final_norm.weight, before)


def test_masked_targets_do_not_count():
    model = make()
    first = batches(0, micro_batch_size=2)
    first[0].loss_mask[:, 5:] = 0
    result = Engine(model, OPTIMIZER).train_step(first, 1e-2)
    model = make()
    losses = [model(b.tokens, b.targets, sequences=b.sequences) * b.loss_mask for b in first]
    expected = sum(x.sum() for x in losses) / sum(b.loss_mask.sum() for b in first)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)


DEEPSPEED = [
    *(ParallelConfig(zero_backend="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)),
    ParallelConfig(zero_backend="deepspeed", zero_stage=2, offload="cpu"),
]


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(zero_stage=0), ParallelConfig(), *DEEPSPEED],
    ids=lambda p: f"{p.zero_backend}-{p.zero_stage}-{p.offload}",
)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_updates_nothing(where, parallel):
    if parallel.zero_backend == "deepspeed":
        pytest.importorskip("deepspeed")
    scale = [1.0]

    def engine():
        """Whose loss, or the gradient of one parameter, is multiplied by the scale."""
        model = make()
        weight = model.final_norm.weight
        if where == "loss":
            model.final_norm.register_forward_hook(lambda *x: x[-1] * scale[0])
        elif weight.requires_grad:
            weight.register_hook(lambda g: g * scale[0])
        return Engine(model, OPTIMIZER, parallel, micro_batches=2)

    found, reference = engine(), engine()
    found.train_step(batches(0), 1e-2)
    reference.train_step(batches(0), 1e-2)
    scale[0] = math.inf
    result = found.train_step(batches(1), 1e-2)
    scale[0] = 1.0
    assert not result.applied
    for step in (2, 3):
        assert found.train_step(batches(step), 1e-2) == reference.train_step(batches(step), 1e-2)


def test_validation_counts_tokens_and_bytes():
    model = make()
    engine = Engine(model, OPTIMIZER)
    parts = batches(0)
    sizes = torch.arange(VOCAB)
    loss, count, text_bytes = engine.validate(parts, sizes)
    assert count == 4 * 32
    assert text_bytes == sum(int(b.targets.sum()) for b in parts)
    mean = torch.cat([model(b.tokens, b.targets, sequences=b.sequences) for b in parts], 1).mean()
    assert loss == pytest.approx(mean.item(), rel=1e-6)


_TWO_PROCESSES = """
import json, sys
from pretrain.parallel.processes import data_parallel_rank_and_size, is_main_process
from pretrain.parallel.processes import start_processes, stop_processes
start_processes()
from tests.pretrain.training.test_engine import OPTIMIZER, STEPS, batches, make
from pretrain.training.engine import Engine
engine = Engine(make(), OPTIMIZER)
rank, size = data_parallel_rank_and_size()
assert size == 2
results = [
    engine.train_step(batches(step, micro_batch_size=1)[rank::size], 1e-3) for step in range(STEPS)
]
if is_main_process():
    print("RESULT", json.dumps([(r.loss, r.grad_norm) for r in results]))
stop_processes()
"""


@pytest.mark.slow
def test_two_data_parallel_processes_equal_one(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(_TWO_PROCESSES)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(script),
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=Path(__file__).parents[3],
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
    assert np.allclose(json.loads(line.removeprefix("RESULT")), engine_loop(make()), rtol=1e-5)
