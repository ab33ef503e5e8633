"""Mixtures of experts against a loop over tokens, and what is told of them."""

import pytest
import torch
import torch.nn.functional as F

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import (
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
    check_run_config,
)
from pretrain.data.batches import pack_rows
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.nn.mixers import LayerContext
from pretrain.nn.moe import MoE
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from pretrain.training.engine import Engine
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")
HIDDEN = 16


def build(dtype=torch.float64, **settings):
    config = MoEConfig(**{"num_experts": 6, "top_k": 2, "intermediate_size": 8, **settings})
    layer = MoE(config, LayerContext(HIDDEN, 0.5, 0.5, current_context(dtype)))
    fill_parameters(layer, seed=1)
    return layer


def by_hand(layer, x):
    """Token after token, expert after expert; also the balancing loss."""
    config = layer.config
    rows, balance = [], 0.0
    tokens = x.flatten(0, 1)
    logits = tokens @ layer.router.t()
    scores = logits.softmax(-1) if config.score == "softmax" else logits.sigmoid()
    wanted = scores + (layer.bias if config.bias_update_rate else 0)
    load = torch.zeros(config.num_experts, dtype=x.dtype)
    for token, score, want in zip(tokens, scores, wanted, strict=True):
        chosen = want.argsort(descending=True)[: config.top_k].tolist()
        weights = score[chosen]
        if config.normalize_top_k:
            weights = weights / weights.sum()
        y = torch.zeros_like(token)
        for expert, weight in zip(chosen, weights * config.weight_scale, strict=True):
            gate, up = (token @ layer.gate_up_proj[expert]).chunk(2)
            y = y + weight * ((F.silu(gate) * up) @ layer.down_proj[expert])
            load[expert] += 1
        rows.append(y)
    if config.score == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    share = load / load.sum()
    balance = config.balance_weight * config.num_experts * (scores * share).sum()
    balance = balance + config.z_loss_weight * logits.logsumexp(-1).square().sum()
    y = torch.stack(rows).view(x.shape)
    return (y + layer.shared(x) if config.shared_intermediate_size else y), balance


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1, "normalize_top_k": False, "balance_weight": 0.3},
        {"score": "sigmoid", "shared_intermediate_size": 4, "weight_scale": 2.5},
        {"top_k": 6, "balance_weight": 0.1, "z_loss_weight": 0.05},
        {"bias_update_rate": 0.1, "balance_weight": 0.0},
    ],
    ids=lambda s: "-".join(s) or "plain",
)
def test_is_the_loop_over_tokens(settings):
    layer = build(**settings)
    if layer.config.bias_update_rate:
        layer.bias.copy_(torch.randn(6))
    x = torch.randn(7, 3, HIDDEN, dtype=torch.float64, requires_grad=True)
    trained = [p for p in layer.parameters() if p.requires_grad]
    cotangent = torch.randn(7, 3, HIDDEN, dtype=torch.float64)
    expected, balance = by_hand(layer, x)
    wanted = torch.autograd.grad((expected * cotangent).sum() + balance, [x, *trained])
    found = layer(x)
    gradients = torch.autograd.grad((found * cotangent).sum(), [x, *trained])
    assert relative_error(found, expected) < 1e-12
    for got, want in zip(gradients, wanted, strict=True):
        assert relative_error(got, want) < 1e-10
    assert relative_error(layer.eval()(x), expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(dtype):
    torch.manual_seed(0)
    wide, narrow = build(), build(dtype)
    x = torch.randn(20, 2, HIDDEN).to(dtype)
    with torch.no_grad():
        for a, b in zip(wide.parameters(), narrow.parameters(), strict=True):
            a.copy_(b)
    # Near a tie the experts may differ: most tokens must agree.
    apart = (wide(x.double()) - narrow(x).double()).norm(dim=-1)
    scale = wide(x.double()).norm(dim=-1).mean()
    limit = {torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
    assert (apart < limit * scale).float().mean() > 0.9


def test_experts_without_tokens():
    layer = build()
    x = torch.randn(5, 1, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router[2:, 0] = -50
    assert relative_error(layer(x), by_hand(layer, x)[0]) < 1e-12


def test_drops_are_what_exceeds_the_capacity_and_counted():
    layer = build(capacity_factor=0.5, top_k=1, normalize_top_k=False)
    x = torch.randn(24, 1, HIDDEN, dtype=torch.float64)
    y = layer(x)
    # Each expert takes 0.5 x 24 / 6 = 2 tokens.
    scores = (x[:, 0] @ layer.router.t()).softmax(-1)
    best, expert = scores.max(-1)
    kept = torch.zeros(24, dtype=torch.bool)
    for e in range(6):
        own = (expert == e).nonzero()[:, 0]
        kept[own[best[own].argsort(descending=True)[:2]]] = True
    assert torch.equal(y[:, 0].abs().sum(-1) > 0, kept)
    assert layer.metrics()["dropped_tokens"] == 24 - int(kept.sum())
    assert "dropped_tokens" not in layer.metrics()
    whole = build(top_k=1, normalize_top_k=False)
    assert relative_error(y[kept], whole(x)[kept]) < 1e-12


def settings(**moe):
    values = {"num_experts": 4, "top_k": 2, "intermediate_size": 16, **moe}
    return build_config(
        ModelConfig,
        {
            "hidden_size": 32,
            "pattern": "2*attn",
            "mixers": {"attn": {"num_heads": 2}},
            "moe": values,
        },
        "test",
    )


def train(model, steps, lr=3e-3):
    engine = Engine(model, OptimizerConfig(lr=lr))
    torch.manual_seed(0)
    found = {}
    for step in range(steps):
        rows = torch.randint(1, 8, (4, 33)).numpy()  # few tokens: experts would collapse
        engine.begin_step(0, step)
        result = engine.train_step([pack_rows(rows, eod_id=0)], lr)
        found = engine.layer_metrics()
    return found, result


def crowded(**settings):
    """Nearly every token's first choice is expert 0; returns the layer and such tokens."""
    layer = build(**settings)
    x = torch.randn(200, 1, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1
    with torch.no_grad():
        layer.router[0, 0] += 4
    return layer, x


def busiest(layer, x):
    layer.metrics()
    layer(x)
    return layer.metrics()["expert_load_max"]


def test_bias_evens_the_load():
    layer, x = crowded(bias_update_rate=0.01, balance_weight=0.0)
    before = busiest(layer, x)
    for _ in range(300):
        layer(x)
        layer.update_bias()
    assert before > 2.5 and busiest(layer, x) < 1.7
    assert float(layer.bias[0]) < -0.1
    assert not layer.bias.requires_grad


def test_balancing_loss_evens_the_load():
    layer, x = crowded(balance_weight=1.0)
    before = busiest(layer, x)
    optimizer = torch.optim.Adam([layer.router], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (layer(x) * 0).sum().backward()  # nothing but the balance
        optimizer.step()
    assert before > 2.5 and busiest(layer, x) < 1.5


def test_the_bias_is_moved_by_training():
    model = build_model(settings(balance_weight=0, bias_update_rate=0.02), 64, seed=0)
    train(model, 3)
    moved = dict(model.named_parameters())["blocks.0.mlp.bias"].detach()
    assert 0.02 - 1e-6 <= float(moved.abs().max()) <= 0.06 + 1e-6


def test_recomputed_passes_count_once():
    loads = []
    for checkpointing in ("none", "block"):
        model = build_model(
            settings(capacity_factor=0.5), 64, seed=0, activation_checkpointing=checkpointing
        )
        found, _ = train(model, 1)
        loads.append(found)
    assert loads[0]["dropped_tokens"] > 0 and loads[0] == loads[1]


def test_counts():
    config = settings(shared_intermediate_size=8, bias_update_rate=0.1, first_dense=1)
    model = build_model(config, 64, seed=0)
    counts = count_model(config, 64, 32)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    dense = count_model(
        build_config(
            ModelConfig,
            {
                "hidden_size": 32,
                "pattern": "2*attn",
                "mixers": {"attn": {"num_heads": 2}},
                "mlp": {"intermediate_size": 2 * 16 + 8},
            },
            "test",
        ),
        64,
        32,
    )
    mlp = 6 * 32 * config.mlp.width(32)
    routed = 6 * 32 * 40
    assert counts.flops_per_token - mlp - 2 * 4 * 32 == dense.flops_per_token - routed


@pytest.mark.parametrize(
    ("moe", "parallel", "words"),
    [
        ({"top_k": 5}, {}, "top_k is 5"),
        ({}, {"expert": 3}, "parallel.expert is 3"),
        ({}, {"tensor": 2}, "parallel.sequence=true"),
        ({}, {"zero_backend": "deepspeed"}, "does not know experts"),
        ({"capacity_factor": 1.0}, {"tensor": 2, "sequence": True}, "capacity_factor is 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(moe, parallel, words):
    with pytest.raises(ConfigError, match=words):
        run = RunConfig(
            "test",
            settings(**moe),
            train=TrainConfig(steps=1, global_batch_tokens=4096),
            parallel=ParallelConfig(**parallel),
        )
        check_run_config(run, "test")
