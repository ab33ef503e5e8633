"""``python -m pretrain verify``: what it takes for rounding, and what for another model."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.common.config_loader import build_config
from pretrain.config import OptimizerConfig, RunConfig, check_run_config
from pretrain.model.build import build_model
from pretrain.training.engine import Engine
from pretrain.training.verify import (
    LIMITS,
    Comparison,
    default_processes,
    largest_difference,
    moves_apart,
    shorten,
)
from tests.helpers import processes
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import batches
from tests.helpers.training_run import Run

LR, STEPS = 4e-3, 4


def train(precision, micro_batch_size, spoil=None):
    """Return the weights after a few steps; many of them began at zero."""
    config = settings(
        pattern="gla linear_attn mamba2",
        mixers={
            "gla": {"num_heads": 2},
            "linear_attn": {"num_heads": 2, "feature_map": "product"},
            "mamba2": {"head_dim": 8},
        },
        init_std=0.02,
        recursion={"times": 2, "lora_rank": 2},
    )
    dtype = {"float32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = build_model(config, VOCAB, seed=0, dtype=dtype)
    if spoil is not None:
        dict(model.named_parameters())[spoil].register_hook(lambda g: g[torch.randperm(len(g))])
    engine = Engine(model, OptimizerConfig(lr=LR))
    for step in range(STEPS):
        torch.manual_seed(step)
        engine.begin_step(0, step)
        engine.train_step(batches(step, 8, micro_batch_size), LR)
    return {name: p.detach().float() for name, p in model.named_parameters()}


ZEROS = ["blocks.0.mixer.a_bias", "blocks.0.mixer.a_up.lora_b"]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_rounding_is_no_difference(precision):
    """Also of what began at zero, where it is large beside the values."""
    found = largest_difference(train(precision, 2), train(precision, 8), LR * STEPS)
    assert 0 < found < LIMITS[precision].later


@pytest.mark.usefixtures("processes")
def test_a_wrong_gradient_of_what_began_at_zero_is_a_difference():
    one = train("float32", 8)
    for name in ZEROS:
        wrong = train("float32", 8, spoil=name)
        found = largest_difference({name: one[name]}, wrong, LR * STEPS)
        assert found > LIMITS["float32"].later, name


def test_the_scale_is_the_norm_or_what_the_steps_can_have_made():
    ones, zeros = torch.ones(16), torch.zeros(16)
    assert largest_difference({"x": ones}, {"x": ones + 1e-4}, 1e-3) == pytest.approx(
        1e-4, rel=1e-2
    )
    assert largest_difference({"x": zeros}, {"x": zeros}, 0.0) == 0
    assert largest_difference({"x": zeros}, {"x": zeros + 1e-3}, 1e-3) == pytest.approx(0.2)
    both = {"x": ones, "y": zeros}
    assert largest_difference(both, {"x": ones * 1.5, "y": zeros}, 1e-3) == pytest.approx(0.5)
    assert largest_difference({"x": ones}, {"x": ones * math.nan}, 1e-3) == math.inf


def test_moves_of_biases_are_counted():
    rate, generator = 5e-4, torch.Generator().manual_seed(0)
    one = torch.randint(0, 2, (6, 64), generator=generator) * 2.0 - 1
    other = one.clone()
    turned = [(0, 3), (2, 5), (5, 60)]
    for place in turned:
        other[place] *= -1
    a, b = ({"bias": x.cumsum(0)[-1] * rate} for x in (one, other))
    assert moves_apart(a, b, rate) == pytest.approx(len(turned))
    assert moves_apart(a, a, rate) == 0
    for precision, limits in LIMITS.items():
        moves = one.numel()
        for apart, equal in ((0, True), (limits.moves * moves, True), (moves / 2, False)):
            found = Comparison("a layout", 0.0, 0.0, 0.0, apart, moves)
            assert found.within(limits) == equal, (precision, apart)
    # Of few moves one may be turned.
    assert Comparison("a layout", 0.0, 0.0, 0.0, 1, 8).within(LIMITS["float32"])
    assert not Comparison("a layout", 0.0, 0.0, 0.0, 2, 8).within(LIMITS["float32"])
    assert not Comparison("a layout", 0.0, 0.0, 0.0, math.nan, 8).within(LIMITS["float32"])


def phased(**changes):
    values = {
        "name": "x",
        "model": {"hidden_size": 8, "pattern": "attn"},
        "data": {"path": "x"},
        "schedule": {"kind": "wsd", "warmup_steps": 100},
        "train": {"tokens": 10**6, "seq_len": 16, "global_batch_tokens": 128},
        "parallel": {"micro_batch_size": 2},
        "phases": [
            {"until": 0.3, "seq_len": 8, "global_batch_tokens": 64},
            {"until": 0.6, "data": {"path": "y"}, "schedule": {"warmup_steps": 50}},
            {},
        ],
        **changes,
    }
    config = build_config(RunConfig, values, "x.yaml")
    check_run_config(config, "x.yaml")
    return config


@pytest.mark.parametrize(("steps", "each"), [(2, 2), (4, 2), (6, 2), (12, 4)])
def test_a_run_in_phases_is_shortened_to_steps_of_each(steps, each):
    config = phased()
    assert shorten(config, steps) == 3 * each
    check_run_config(config, "x.yaml")
    plan = config.plan
    assert [(p.first, p.last) for p in plan.phases] == [
        (number * each, (number + 1) * each) for number in range(3)
    ]
    assert [plan.batch_tokens(n * each) for n in range(3)] == [64, 128, 128]
    assert [p.config.train.seq_len for p in plan.phases] == [8, 16, 16]
    assert plan.phases[1].config.data.path == "y"
    alone = phased(phases=[])
    assert shorten(alone, steps) == steps == alone.plan.num_steps


def test_processes_suit_the_batches_of_every_phase():
    assert default_processes(phased(parallel={"tensor": 2, "micro_batch_size": 2})) == 4
    small = [{"until": 0.5, "global_batch_tokens": 32}, {}]
    assert (
        default_processes(phased(parallel={"tensor": 2, "micro_batch_size": 1}, phases=small)) == 4
    )
    small[0]["global_batch_tokens"] = 16
    assert (
        default_processes(phased(parallel={"tensor": 2, "micro_batch_size": 1}, phases=small)) == 2
    )


@pytest.mark.slow
def test_sharded_experts_with_a_bias_are_equal_where_processes_share_rows(tmp_path, corpus):
    run = Run(tmp_path, corpus, "experts")
    done = processes.run(
        *("pretrain", "verify", run.config, "--processes", 2),
        "model.moe={num_experts: 8, top_k: 2, intermediate_size: 16, bias_update_rate: 5e-4}",
        *("parallel.expert=2", "parallel.context=2", "train.precision=bf16"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "expert biases" in done.stdout
    assert f"/{2 * 8 * 4} " in done.stdout  # two layers of eight, four steps
