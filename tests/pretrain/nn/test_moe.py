"""Mixtures of experts against a loop over tokens, and what is told of them."""

import math
from fractions import Fraction

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
from pretrain.model.build import build_model, build_stages
from pretrain.model.counts import count_model
from pretrain.model.language_model import LanguageModel
from pretrain.nn.mixers import LayerContext
from pretrain.nn.moe import MoE
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from pretrain.training.engine import Engine
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")
HIDDEN = 16


def build(dtype=torch.float64, seq_len=None, **settings):
    config = MoEConfig(**{"num_experts": 6, "top_k": 2, "intermediate_size": 8, **settings})
    layer = MoE(config, LayerContext(HIDDEN, 0.5, 0.5, current_context(dtype), seq_len=seq_len))
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
    if not config.shared_intermediate_size:
        return y, balance
    gate = (x @ layer.shared_gate[0]).sigmoid()[..., None] if config.shared_gate else 1.0
    return y + gate * layer.shared(x), balance


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 1, "normalize_top_k": False, "balance_weight": 0.3},
        {"score": "sigmoid", "shared_intermediate_size": 4, "weight_scale": 2.5},
        {"shared_intermediate_size": 4, "shared_gate": True},
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


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("seq_len", [None, 12, 8, 7])  # 7 does not divide the tokens
@pytest.mark.parametrize(
    "moe", [{"top_k": 1, "capacity_factor": 0.5}, {"capacity_factor": 0.8}, {"capacity_factor": 3}]
)
def test_an_expert_takes_the_first_tokens_of_a_sequence(moe, seq_len, rows):
    layer = build(seq_len=seq_len, **moe)
    config = layer.config
    x = torch.randn(24, rows, HIDDEN, dtype=torch.float64)
    scores = (x @ layer.router.t()).softmax(-1)
    length = 24 if seq_len in (None, 7) else seq_len
    room = math.ceil(Fraction(str(config.capacity_factor)) * config.top_k * length / 6)
    expected, dropped = torch.zeros_like(x), 0
    for row in range(rows):
        for t in range(24):
            if t % length == 0:
                taken = [0] * 6
            chosen = scores[t, row].argsort(descending=True)[: config.top_k].tolist()
            total = scores[t, row, chosen].sum()
            for e in chosen:
                taken[e] += 1
                if taken[e] > room:
                    dropped += 1
                    continue
                gate, up = (x[t, row] @ layer.gate_up_proj[e]).chunk(2)
                y = (F.silu(gate) * up) @ layer.down_proj[e]
                expected[t, row] += scores[t, row, e] / total * y
    assert relative_error(layer(x), expected) < 1e-12
    assert layer.metrics()["dropped_tokens"] == dropped
    assert (dropped > 0) == (config.capacity_factor < 1)
    assert "dropped_tokens" not in layer.metrics()
    # Nothing is dropped outside training.
    whole = build(**{**moe, "capacity_factor": None})
    assert relative_error(layer.eval()(x), whole(x)) < 1e-12
    assert layer.metrics() == {}


def crowded_model(seq_len=None):
    """Return a model whose experts have room for a few of the tokens that want them."""
    config = settings(top_k=1, capacity_factor=0.5, balance_weight=0)
    config.init_std = 0.2
    model = LanguageModel(config, 64, current_context(torch.float64), seq_len=seq_len)
    fill_parameters(model, seed=0)
    return model


@torch.no_grad()
def test_a_score_does_not_depend_on_what_lies_beside_or_behind():
    model = crowded_model().eval()
    tokens = torch.randint(0, 64, (1, 40))
    logits = model(tokens)
    for start in (7, 20, 33):
        packed = model(tokens, sequences=torch.tensor([0, start, 40]))
        assert relative_error(packed[:, start:], model(tokens[:, start:])) < 1e-12
        assert relative_error(packed[:, :start], logits[:, :start]) < 1e-12
        changed = tokens.clone()
        changed[:, start] = (changed[:, start] + 1) % 64
        assert relative_error(model(changed)[:, :start], logits[:, :start]) < 1e-12
        _, states = model.forward_with_state(tokens[:, :start], None)
        continued, _ = model.forward_with_state(tokens[:, start:], states)
        assert relative_error(continued, logits[:, start:]) < 1e-12
    rows = torch.cat([torch.randint(0, 64, (2, 40)), tokens])
    assert relative_error(model(rows)[2:], logits) < 1e-12
    assert model.metrics() == {}


@torch.no_grad()
def test_no_token_is_dropped_for_a_later_one_or_for_another_sequence():
    model = crowded_model(seq_len=20)
    tokens = torch.randint(0, 64, (1, 60))  # three sequences of a packed micro-batch
    ends = torch.tensor([0, 20, 26, 40, 60])  # the second of two documents
    logits = model(tokens, sequences=ends)
    assert model.metrics()["dropped_tokens"] > 0
    for changed_at in (0, 19, 23, 30, 39, 45):
        changed = tokens.clone()
        changed[:, changed_at] = (changed[:, changed_at] + 1) % 64
        found = model(changed, sequences=ends)
        first = changed_at // 20 * 20
        same = [*range(changed_at), *range(first + 20, 60)]
        assert relative_error(found[:, same], logits[:, same]) < 1e-12
    for first in (0, 20, 40):
        inner = (ends[(ends >= first) & (ends <= first + 20)] - first).clone()
        alone = model(tokens[:, first : first + 20], sequences=inner)
        assert relative_error(logits[:, first : first + 20], alone) < 1e-12
    rows = tokens.view(3, 20)
    assert relative_error(model(rows)[0], model(rows[:1])[0]) < 1e-12


def test_the_size_of_micro_batches_changes_no_drop():
    found = []
    for size in (1, 2, 4):
        (model,) = build_stages(
            settings(top_k=1, capacity_factor=0.5, balance_weight=0), 64, seed=0, seq_len=32
        )
        engine = Engine(model, OptimizerConfig(lr=3e-3))
        rows = torch.randint(1, 64, (4, 33), generator=torch.Generator().manual_seed(0)).numpy()
        engine.begin_step(0, 0)
        parts = [pack_rows(rows[i : i + size], eod_id=9) for i in range(0, 4, size)]
        result = engine.train_step(parts, 3e-3)
        found.append((result.loss, result.grad_norm, model.metrics()["dropped_tokens"]))
    assert found[0][2] > 0
    assert all(x == pytest.approx(found[0], rel=1e-6) for x in found)


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
    for checkpointing in ("none", "selective", "block"):
        model = build_model(
            settings(capacity_factor=0.5), 64, seed=0, activation_checkpointing=checkpointing
        )
        found, _ = train(model, 1)
        loads.append(found)
    assert loads[0]["dropped_tokens"] > 0 and loads[0] == loads[1] == loads[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_selective_checkpointing_changes_no_bit(dtype):
    config = settings(
        shared_intermediate_size=8, shared_gate=True, balance_weight=0.1, z_loss_weight=0.1
    )
    gradients = []
    for checkpointing in ("none", "selective"):
        model = build_model(config, 64, seed=0, dtype=dtype, activation_checkpointing=checkpointing)
        tokens, targets = torch.arange(80).view(2, 1, 40) % 64
        model(tokens, targets).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


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
