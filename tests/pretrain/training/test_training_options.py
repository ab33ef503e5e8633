"""What training can do besides the default: each option against its definition."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.checkpoint.state import load_weights
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SpikeConfig,
    TrainConfig,
    check_run_config,
)
from pretrain.data.batches import TrainingBatches, open_data
from pretrain.nn.parameters import draw_like, info_of
from pretrain.optim.optimizer import lr_multiple
from pretrain.training.engine import Engine
from pretrain.training.spikes import SpikeDetector
from tests.helpers import processes
from tests.helpers.small_model import VOCAB, make, settings
from tests.helpers.small_training import STATE, batches
from tests.helpers.training_run import Run

pytestmark = pytest.mark.usefixtures("processes")
ALONE = ParallelConfig(zero_stage=0)


def trained(steps=3, model=None, parallel=ALONE, lr=1e-2, **optimizer):
    model = make(torch.float32) if model is None else model
    engine = Engine(model, OptimizerConfig(lr=lr, clip_grad=0.0, **optimizer), parallel)
    for step in range(steps):
        engine.begin_step(0, step)
        engine.train_step(batches(step), lr)
    return engine


# Logits


def test_soft_capped_logits_and_their_loss():
    tokens = torch.randint(VOCAB, (2, 33))
    model = make(logit_softcap=0.5)
    plain = make()
    logits = plain(tokens[:, :-1])
    capped = model(tokens[:, :-1])
    assert torch.allclose(capped, 0.5 * torch.tanh(logits / 0.5))
    assert capped.abs().max() < 0.5 < logits.abs().max()
    expected = F.cross_entropy(capped.transpose(1, 2).float(), tokens[:, 1:], reduction="none")
    assert torch.allclose(model(tokens[:, :-1], tokens[:, 1:]).float(), expected, rtol=1e-5)
    model.logits_at_once = 7 * VOCAB
    pieces = model(tokens[:, :-1], tokens[:, 1:])
    assert torch.allclose(pieces.float(), expected, rtol=1e-5)


def test_z_loss_is_in_the_gradient_of_training_alone():
    tokens = torch.randint(VOCAB, (2, 33))
    model, plain = make(z_loss_weight=0.3), make()
    losses = model(tokens[:, :-1], tokens[:, 1:])
    losses.sum().backward()
    logits = plain(tokens[:, :-1])
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    assert torch.allclose(losses, expected, rtol=1e-6)  # the value is the cross entropy
    (expected + 0.3 * logits.logsumexp(-1).square()).sum().backward()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-9), name


# Maximal-update parametrization


def widened(width, **changes):
    """As wide a model with as many more heads of the same width."""
    return make(
        torch.float32,
        hidden_size=width,
        init_std=0.1,
        tie_embeddings=False,
        mixers={
            "gdn": {"num_heads": width // 16, "head_dim": 8},
            "attn": {"num_heads": width // 8, "num_kv_heads": width // 8},
        },
        **changes,
    )


def change_of_logits(width, **changes):
    """Root mean square, over a few steps on the same tokens."""
    model = widened(width, **changes)
    (batch,) = batches(0, rows=1)
    before = model(batch.tokens, sequences=batch.sequences).detach()
    engine = Engine(model, OptimizerConfig(weight_decay=0.0), ALONE)
    for _ in range(4):
        engine.train_step([batch], 5e-3)
    after = model(batch.tokens, sequences=batch.sequences).detach()
    return (after - before).square().mean().sqrt().item()


def test_updates_do_not_grow_with_the_width():
    """The coordinate check of arXiv 2203.03466, appendix D.1."""
    narrow = change_of_logits(32)
    assert change_of_logits(32, mup_base_hidden_size=32) == pytest.approx(narrow, rel=1e-6)
    standard = change_of_logits(512) / change_of_logits(128)
    maximal, before = (change_of_logits(w, mup_base_hidden_size=32) for w in (512, 128))
    # Towards a limit, where the standard one keeps growing (measured: 0.81 and 2.4).
    assert 0.7 < maximal / before < 1.2
    assert standard > 2


def test_matrices_start_smaller_and_learn_slower_with_the_width():
    model = widened(128, mup_base_hidden_size=32)
    plain = dict(widened(128).named_parameters())
    matrices = 0
    for name, p in model.named_parameters():
        if info_of(p).matrix:
            matrices += 1
            assert lr_multiple(info_of(p), "adamw", 1e-3) == 0.25
            assert torch.allclose(p, plain[name] / 2)
        else:
            assert getattr(p, "lr_mult", 1.0) == 1.0
            assert torch.equal(p, plain[name])
    assert matrices == 2 * (7 + 4 + 2 * 3)  # gdn's, attention's and the MLPs' projections


# Optimizers


def test_muon_is_torchs_and_leaves_the_rest_to_adamw():
    engine = trained(3, kind="muon", weight_decay=0.2, lr=1e-2)
    model = make(torch.float32)
    hidden = [p for p in model.parameters() if info_of(p).matrix]
    others = [p for p in model.parameters() if not info_of(p).matrix]
    optimizers = [
        torch.optim.Muon(hidden, lr=1e-2, weight_decay=0.2, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [
                {"params": [p for p in others if info_of(p).weight_decay], "weight_decay": 0.2},
                {"params": [p for p in others if not info_of(p).weight_decay], "weight_decay": 0.0},
            ],
            lr=1e-2,
            betas=(0.9, 0.95),
        ),
    ]
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        parts = batches(step)
        count = sum(float(b.loss_mask.sum()) for b in parts)
        for b in parts:
            losses = model(b.tokens, b.targets, sequences=b.sequences)
            ((losses * b.loss_mask).sum() / count).backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, a), b in zip(engine.parts[0].named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=2e-3, atol=2e-4), name
    start = make(torch.float32)
    name, moved = next((n, p) for n, p in engine.parts[0].named_parameters() if "q_proj" in n)
    assert (moved - start.get_parameter(name)).abs().max() > 1e-2


def test_experts_are_orthogonalised_one_by_one():
    model = make(torch.float32, moe={"num_experts": 4, "intermediate_size": 8})
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained(1, model, kind="muon", weight_decay=0.0)
    name = next(n for n in before if n.endswith("gate_up_proj"))
    for change in model.get_parameter(name) - before[name]:
        size = torch.linalg.matrix_norm(change.detach(), 2) / (1e-2 * 0.2 * math.sqrt(24))
        assert 0.6 < size < 1.3


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_averaged_weights(tmp_path, zero_stage):
    parallel = ParallelConfig(zero_stage=zero_stage)
    model = make(torch.float32)
    averages = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = OptimizerConfig(lr=1e-2, ema_decay=0.5)
    engine = Engine(model, optimizer, parallel)
    for step in range(6):
        engine.train_step(batches(step), 1e-2)
        decay = min(0.5, (2 + step) / (11 + step))
        for n, p in model.named_parameters():
            averages[n].lerp_(p.detach(), 1 - decay)
    path = save_checkpoint(
        tmp_path, engine, RunConfig("test", settings(), optimizer=optimizer), STATE
    )
    loaded = make(torch.float32, seed=5)
    load_weights(path, loaded, averaged=True)
    for n, p in loaded.named_parameters():
        assert torch.allclose(p, averages[n], rtol=1e-5, atol=1e-7), n
        assert not torch.equal(p, model.get_parameter(n))
    path = save_checkpoint(tmp_path, trained(1), RunConfig("test", settings()), STATE)
    with pytest.raises(UserError, match="has no averaged weights"):
        load_weights(path, loaded, averaged=True)


def test_gradient_noise_has_the_variance_asked_for():
    """Adam's first step is the gradient's sign, so plain gradients are read off its state."""
    engines = [trained(4, gradient_noise=eta, lr=1e-30) for eta in (0.0, 0.04)]
    states = [
        {
            n: engine.backend._tensors(place, main)["exp_avg"]
            for n, _, place, main, _ in engine.backend._mains()
        }
        for engine in engines
    ]
    noise = torch.cat([(states[1][n] - states[0][n]).flatten() for n in states[0]])
    variance = sum((0.1 * 0.9 ** (3 - t)) ** 2 * 0.04 / (1 + t) ** 0.55 for t in range(4))
    assert noise.std().item() == pytest.approx(variance**0.5, rel=0.03)
    assert abs(noise.mean().item()) < 0.1 * variance**0.5
    p = make(torch.float32).embedding.weight
    assert torch.equal(draw_like(p, 1.0, "a"), draw_like(p, 1.0, "a"))
    assert not torch.equal(draw_like(p, 1.0, "a"), draw_like(p, 1.0, "b"))


# Batches that grow


def test_batches_double_and_no_data_is_skipped(corpus):
    usual = TrainConfig(steps=40, seq_len=16, global_batch_tokens=256)
    config = dataclasses.replace(usual, batch_warmup_steps=9, batch_warmup_start=64)
    sizes = [config.batch_tokens(step) for step in range(12)]
    assert sizes == [64] * 5 + [128] * 4 + [256] * 3
    assert [config.tokens_before(s) for s in (0, 5, 9, 12)] == [0, 320, 832, 1600]
    data = open_data(DataConfig(str(corpus)))
    grown, constant = (TrainingBatches(data, c, 2, seed=3) for c in (config, usual))

    def rows(loader, steps, **place):
        found = [b.tokens.view(-1, 16) for s in range(steps) for b in loader.micro_batches(s)]
        return torch.cat(found)

    seen = rows(grown, 12)
    assert torch.equal(seen, rows(constant, 7)[: len(seen)])
    assert grown.epochs(12) == pytest.approx([e * 100 / 96 for e in constant.epochs(6)])


def test_a_budget_of_tokens_counts_the_warm_up():
    for tokens in (64, 65, 320, 321, 831, 832, 833, 1600, 1601, 9999):
        config = TrainConfig(
            tokens=tokens,
            seq_len=16,
            global_batch_tokens=256,
            batch_warmup_steps=9,
            batch_warmup_start=64,
        )
        steps = config.num_steps
        assert config.tokens_before(steps - 1) < tokens <= config.tokens_before(steps)


# Spikes


def test_what_is_a_spike():
    generator = np.random.default_rng(0)
    detector = SpikeDetector(SpikeConfig(policy="skip", window=32), [])
    for loss in generator.normal(3.0, 0.05, 31):
        assert not detector.is_spike(9.0), "before the window is full"
        detector.add(loss)
    detector.add(3.0)
    assert not detector.is_spike(3.2)
    assert detector.is_spike(3.5)
    assert not detector.is_spike(1.0)
    assert len(detector.recent) == 32
    for _ in range(3):
        detector.add(3.5)
    assert not detector.is_spike(3.5), "what stays is none"
    flat = SpikeDetector(SpikeConfig(policy="skip", window=8), [2.0] * 8)
    assert not flat.is_spike(2.05), "less than the margin"
    off = SpikeDetector(SpikeConfig(window=8), [2.0] * 8)
    assert not off.is_spike(9.0)


def spiking(run, policy, *overrides):
    done = processes.run(
        "tests.helpers.spiking_run",
        run.config,
        f"train.spikes.policy={policy}",
        "train.spikes.window=8",
        "train.spikes.deviations=3",
        "train.spikes.rollback_steps=5",
        "train.spikes.skip_steps=3",
        "checkpoint.keep_last=4",
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    return {row["step"]: row for row in run.metrics if "loss" in row}, done.stdout


@pytest.mark.slow
def test_spikes_are_skipped_or_rolled_back(tmp_path, corpus):
    plain, _ = spiking(Run(tmp_path, corpus, "none", steps=30), "none")
    height = plain[21]["loss"]
    assert height > plain[20]["loss"] + 1
    run = Run(tmp_path, corpus, "skip", steps=30)
    losses, output = spiking(run, "skip")
    assert 21 not in losses
    assert losses[30]["skipped"] == 1
    assert f"step 21: loss {height:.4f} is a spike, skipped" in output
    assert all(losses[s]["loss"] == plain[s]["loss"] for s in range(1, 21))
    # The step's data did nothing.
    assert losses[22]["loss"] != plain[22]["loss"]

    run = Run(tmp_path, corpus, "rollback", steps=30)
    losses, output = spiking(run, "rollback")
    assert "rolled back to step 15, skipping the data up to the spike and of 3 steps" in output
    assert sorted(losses) == list(range(1, 31))
    assert max(row["loss"] for s, row in losses.items() if s > 15) < height - 1
    assert all(losses[s]["loss"] == plain[s]["loss"] for s in range(1, 16))
    assert losses[16]["loss"] != plain[16]["loss"], "other data"
    dropped = (run.directory / "metrics-rolled-back.jsonl").read_text().splitlines()
    steps = [row["step"] for row in map(json.loads, dropped) if "loss" in row]
    assert steps == list(range(16, 21))
    state = json.loads((run.directory / "checkpoints/step-00000030/state.json").read_text())
    assert (state["rollbacks"], state["data_offset"]) == (1, (21 - 15 + 3) * 128)
    # The means over steps are of those that count.
    rare, _ = spiking(Run(tmp_path, corpus, "rare", steps=30), "rollback", "logging.every=4")
    for step in range(4, 29, 4):
        expected = np.mean([losses[i]["loss"] for i in range(step - 3, step + 1)])
        assert rare[step]["loss_mean"] == pytest.approx(expected, rel=1e-12), step
    # Stopped anywhere behind it, it resumes with the same data.
    again = Run(tmp_path, corpus, "rollback", steps=33)
    more, _ = spiking(again, "rollback", "--force")  # the decay had ended
    assert sorted(more) == list(range(1, 34))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"deepspeed": True, "optimizer": OptimizerConfig(kind="muon")},
            "zero_backend=megatron with zero_stage 0 or 1",
        ),
        ({"train.batch_warmup_steps": 5}, "expected both or neither"),
        ({"train.batch_warmup_steps": 5, "train.batch_warmup_start": 96}, "does not double to"),
        ({"train.batch_warmup_steps": 5, "train.batch_warmup_start": 16}, "expected a multiple"),
        (
            {"train.spikes": SpikeConfig(policy="rollback", rollback_steps=500)},
            "expected checkpoint.keep_last of at least 4",
        ),
        ({"deepspeed": True, "optimizer": OptimizerConfig(ema_decay=0.9)}, "ema_decay is 0.9"),
        ({"deepspeed": True, "train.spikes": SpikeConfig(policy="skip")}, "policy is skip"),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    train = {k.removeprefix("train."): v for k, v in changes.items() if k.startswith("train.")}
    parallel = ParallelConfig(
        micro_batch_size=2, zero_backend="deepspeed" if "deepspeed" in changes else "megatron"
    )
    with pytest.raises(ConfigError, match=message):
        run = RunConfig(
            "test",
            settings(),
            data=DataConfig("x"),
            parallel=parallel,
            train=TrainConfig(steps=200, seq_len=16, global_batch_tokens=256, **train),
            optimizer=changes.get("optimizer", OptimizerConfig()),
        )
        check_run_config(run, "test")
