"""A step that updates nothing leaves nothing behind: a run resumed after it finds the same bits."""

from __future__ import annotations

import dataclasses
import math
import shutil

import pytest
import torch

from pretrain.checkpoint.state import load_checkpoint, load_weights, read_state
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.checkpoint_folders import checkpoint_name
from pretrain.config import ParallelConfig, RunConfig
from pretrain.data.batches import TrainingBatches
from pretrain.model.build import build_model
from pretrain.training.engine import Engine
from pretrain.training.trainer import Trainer
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import OPTIMIZER, STATE, batches
from tests.helpers.training_run import Run

EXPERTS = {
    "num_experts": 8,
    "top_k": 2,
    "intermediate_size": 8,
    "bias_update_rate": 0.05,
    "capacity_factor": 1.0,
}
MEGATRON = [ParallelConfig(zero_stage=0), ParallelConfig()]
DEEPSPEED = [ParallelConfig(zero_backend="deepspeed", zero_stage=stage) for stage in range(4)]


class Spoiled(Exception):
    """What a forward pass raises."""


def make(parallel):
    """Return an engine, and what spoils its next steps: None, or a kind of ``leave_out``."""
    experts = {"moe": EXPERTS} if parallel.zero_backend == "megatron" else {}
    config = settings(init_std=0.05, dropout=0.1, **experts)
    model, spoilt = build_model(config, VOCAB, seed=0), [None]

    def spoil(*hooked):
        if spoilt[0] == "raises":
            raise Spoiled
        return hooked[-1] * (math.inf if spoilt[0] == "loss" else 1.0)

    model.final_norm.register_forward_hook(spoil)
    weight = model.final_norm.weight
    if weight.requires_grad:
        weight.register_hook(lambda g: g * (math.inf if spoilt[0] == "gradient" else 1.0))
    return config, Engine(model, OPTIMIZER, parallel), spoilt


def step(engine, number, skip_if=None):
    engine.begin_step(0, number)
    return engine.train_step(batches(number), 1e-2, skip_if)


def leave_out(engine, spoilt, how):
    """Do step 2 of a run such that it updates nothing."""
    if how == "skipped":
        assert not step(engine, 2, lambda loss: True).applied
        return
    if how == "between":  # a pass of no step at all
        for batch in batches(2):
            engine.parts[0](batch.tokens, batch.targets, sequences=batch.sequences)
        return
    spoilt[0] = how
    if how == "raises":
        with pytest.raises(Spoiled):
            step(engine, 2)
    else:
        assert not step(engine, 2).applied
    spoilt[0] = None


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    ("how", "parallel"),
    [
        *((how, p) for how in ("loss", "gradient") for p in [*MEGATRON, *DEEPSPEED]),
        *((how, p) for how in ("skipped", "raises", "between") for p in MEGATRON),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.zero_backend}-{x.zero_stage}",
)
def test_an_engine_resumed_after_one_goes_on_as_the_other(how, parallel, tmp_path):
    if parallel.zero_backend == "deepspeed":
        pytest.importorskip("deepspeed")
    config, ongoing, spoilt = make(parallel)
    for number in range(2):
        assert step(ongoing, number).applied
    leave_out(ongoing, spoilt, how)
    saved = dataclasses.replace(STATE, step=3, skipped=1, model=dataclasses.asdict(config))
    checkpoint = save_checkpoint(tmp_path, ongoing, RunConfig("test", config), saved)
    _, resumed, _ = make(parallel)
    load_checkpoint(checkpoint, resumed)
    for number in range(3, 6):
        assert step(ongoing, number) == step(resumed, number)
    a, b = (
        save_checkpoint(tmp_path / name, engine, RunConfig("test", config), saved)
        for name, engine in (("a", ongoing), ("b", resumed))
    )
    assert_same_weights(a, b)


def weights(checkpoint):
    state = read_state(checkpoint)
    model = build_model(state.model_config, state.vocab_size, seed=1)
    load_weights(checkpoint, model)
    return dict(model.named_parameters())


def assert_same_weights(a, b):
    found, expected = weights(a), weights(b)
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


STEPS, SPOILED_STEP = 16, 12  # from 1


@pytest.fixture
def spoiled_data(monkeypatch):
    """Return a function that spoils the data of a step: by noise, or by what is not finite."""
    batch = TrainingBatches._batch

    def spoil(kind):
        def spoiled(self, mix, indices, offset):
            found = batch(self, mix, indices, offset)
            if indices.start // 4 == SPOILED_STEP - 1:  # four samples to a step
                generator = torch.Generator().manual_seed(0)
                found.tokens.fill_(5)  # few experts take them all
                if kind == "noise":
                    found.targets.random_(0, 300, generator=generator)
                else:
                    found.loss_mask.fill_(math.inf)
            return found

        monkeypatch.setattr(TrainingBatches, "_batch", spoiled)

    return spoil


@pytest.mark.slow
@pytest.mark.usefixtures("no_groups")
@pytest.mark.parametrize(
    ("data", "override", "resumed_at"),
    [
        ("noise", "train.spikes.policy=skip", SPOILED_STEP),
        ("noise", "train.spikes.policy=rollback", SPOILED_STEP - 4),
        ("not finite", "train.nonfinite=skip", SPOILED_STEP),
    ],
    ids=["skipped", "rolled back", "not finite"],
)
def test_a_run_resumed_after_one_goes_on_as_the_other(
    data, override, resumed_at, tmp_path, corpus, spoiled_data
):
    spoiled_data(data)
    experts = ", ".join(f"{name}: {value}" for name, value in EXPERTS.items())
    overrides = [
        f"model.moe={{{experts}}}",
        "train.spikes={window: 8, deviations: 3, rollback_steps: 3, skip_steps: 2}",
        override,
        *("checkpoint.every=4", "checkpoint.keep_last=9", "sample.tokens=0"),
    ]
    whole, again = (Run(tmp_path, corpus, name, steps=STEPS) for name in ("whole", "again"))
    assert Trainer(whole.config, overrides=overrides).fit().status == "completed"
    left_out = [row for row in whole.metrics if {"spike", "rolled_back_from"} & set(row)]
    assert bool(left_out) == (data == "noise")
    folder = f"checkpoints/{checkpoint_name(resumed_at)}"
    shutil.copytree(whole.directory / folder, again.directory / folder)
    assert Trainer(again.config, overrides=overrides).fit().status == "completed"
    losses = [row for row in whole.losses if row["step"] > resumed_at and "loss" in row]
    assert [row for row in again.losses if row["step"] > resumed_at and "loss" in row] == losses
    last = f"checkpoints/{checkpoint_name(STEPS)}"
    assert_same_weights(whole.directory / last, again.directory / last)
