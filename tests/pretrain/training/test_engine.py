"""The engine against a plain torch loop, on one process and on two."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from pretrain.config import OptimizerConfig, ParallelConfig
from pretrain.data.batches import pack_rows
from pretrain.training.engine import Engine
from tests.helpers import data_parallel_worker
from tests.helpers.processes import run_on
from tests.helpers.small_model import VOCAB
from tests.helpers.small_training import OPTIMIZER, batches, engine_loop, make, plain_loop

pytestmark = pytest.mark.usefixtures("processes")


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


BACKENDS = pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(zero_stage=0), ParallelConfig(), *DEEPSPEED],
    ids=lambda p: f"{p.zero_backend}-{p.zero_stage}-{p.offload}",
)


@BACKENDS
@pytest.mark.parametrize("lengths", [[32, 16], [5, 32, 32, 8, 5], [16, 7, 16]], ids=str)
def test_micro_batches_may_be_of_different_lengths(lengths, parallel):
    if parallel.zero_backend == "deepspeed":
        pytest.importorskip("deepspeed")
    generator = np.random.default_rng(0)
    parts = [pack_rows(generator.integers(0, VOCAB, (1, n + 1)), eod_id=7) for n in lengths]
    parts[0].loss_mask[:, 2:] = 0
    result = Engine(make(), OPTIMIZER, parallel).train_step(parts, 1e-2)
    model = make()
    losses = [model(b.tokens, b.targets, sequences=b.sequences) * b.loss_mask for b in parts]
    expected = sum(x.sum() for x in losses) / sum(b.loss_mask.sum() for b in parts)
    expected.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf)
    assert result.loss == pytest.approx(expected.item(), rel=1e-5)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-5)


@BACKENDS
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
        return Engine(model, OPTIMIZER, parallel)

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


def test_two_data_parallel_processes_equal_one(tmp_path):
    path = tmp_path / "found.json"
    run_on(2, data_parallel_worker.__name__, path)
    assert np.allclose(json.loads(path.read_text()), engine_loop(make()), rtol=1e-5)
