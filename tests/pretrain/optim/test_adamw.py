"""The implementations of AdamW's update against each other, the GPU's by its form for a CPU."""

from __future__ import annotations

import pytest
import torch

from pretrain.checkpoint.state import load_checkpoint
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.config import ParallelConfig, RunConfig
from pretrain.optim import adamw
from pretrain.training.engine import Engine
from tests.helpers.small_model import settings
from tests.helpers.small_training import OPTIMIZER, STATE, batches, make

SHAPES = [(), (1,), (7, 5), (64, 33), (3, 4, 5)]


def updated(implementation, monkeypatch, steps=20):
    """Return parameters and moments after some updates."""
    monkeypatch.setattr(adamw, "implementation", lambda device_type: implementation)
    generator = torch.Generator().manual_seed(3)
    params = [torch.randn(shape, generator=generator) for shape in SHAPES]
    state = {p: {key: torch.zeros_like(p) for key in adamw.STATE_KEYS} for p in params}
    group = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    for step in range(1, steps + 1):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        adamw.update(params, state, {**group, "step": step})
    return [*params, *(state[p][key] for p in params for key in adamw.STATE_KEYS)]


def test_the_fused_update_is_a_gpus_alone():
    assert adamw.implementation("cuda") == "fused"
    assert adamw.implementation("cpu") == "foreach"


def test_fused_equals_foreach_within_rounding(monkeypatch):
    fused, foreach = (updated(name, monkeypatch) for name in ("fused", "foreach"))
    for a, b in zip(fused, foreach, strict=True):
        assert torch.allclose(a, b, rtol=2e-6, atol=2e-7)
    assert not all(torch.equal(a, b) for a, b in zip(fused, foreach, strict=True))  # two programs


CASES = [
    (ParallelConfig(zero_stage=0), torch.float32),
    (ParallelConfig(zero_stage=0), torch.bfloat16),
    (ParallelConfig(zero_stage=1), torch.bfloat16),
    (ParallelConfig(zero_backend="deepspeed", zero_stage=0), torch.float32),
    *((ParallelConfig(zero_backend="deepspeed", zero_stage=n), torch.bfloat16) for n in (1, 2, 3)),
]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(("parallel", "dtype"), CASES)
def test_every_backend_trains_and_resumes_with_the_fused_update(
    parallel, dtype, tmp_path, monkeypatch
):
    if parallel.zero_backend == "deepspeed":
        pytest.importorskip("deepspeed")

    def trained(engine, steps):
        return [engine.train_step(batches(step), 1e-2) for step in steps]

    def new():
        return Engine(make(dtype), OPTIMIZER, parallel)

    reference = trained(new(), range(4))
    monkeypatch.setattr(adamw, "implementation", lambda device_type: "fused")
    engine = new()
    found = trained(engine, range(2))
    path = save_checkpoint(tmp_path, engine, RunConfig(name="fused", model=settings()), STATE)
    rest = trained(engine, (2, 3))
    resumed = new()
    load_checkpoint(path, resumed)
    assert trained(resumed, (2, 3)) == rest
    tolerance = 1e-5 if dtype == torch.float32 else 3e-3
    for a, b in zip([*found, *rest], reference, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=tolerance)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=10 * tolerance)
