"""Losses of earlier passes of a loop: against each written out, and what they may not change."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from pretrain.common.config_loader import ConfigError, build_config
from pretrain.config import InitializeConfig, ModelConfig
from pretrain.model.build import build_model
from pretrain.model.counts import count_model
from pretrain.ops.cross_entropy.sharded_divergence import sharded_divergence
from pretrain.training.initialization import fill_from
from tests.helpers.recursion_kinds import KINDS, RECURRENT_DEPTH
from tests.helpers.relative_error import relative_error

pytestmark = pytest.mark.usefixtures("processes")
VOCAB = 40
LOOPS = {name: loop for name, loop in KINDS.items() if not loop.get("halting")}


def settings(recursion, **changes):
    values = {
        "hidden_size": 16,
        "pattern": "gdn attn gdn",
        "mixers": {"gdn": {"num_heads": 2, "head_dim": 4}, "attn": {"num_heads": 2}},
        "mlp": {"ratio": 2},
        "init_std": 0.2,
        "recursion": recursion,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(recursion, **changes):
    return build_model(settings(recursion, **changes), VOCAB, seed=0, dtype=torch.float64)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", LOOPS)
@pytest.mark.parametrize("distill", [False, True])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "logit_softcap": 3.0}])
def test_the_gradient_is_that_of_every_pass_written_out(kind, distill, changes):
    loop = {**LOOPS[kind], "state_init": "zeros" if kind == "depth" else "input"}
    model = make({**loop, "exit_weight": 0.3, "exit_distill": distill}, **changes)
    plain = make(loop, **changes)
    plain.load_state_dict(model.state_dict())
    tokens, targets = torch.randint(VOCAB, (2, 2, 11), generator=torch.Generator().manual_seed(0))
    model.logits_at_once = plain.logits_at_once = 5 * VOCAB  # several pieces
    losses = model(tokens, targets)
    found = gradients(model, losses.sum())
    assert torch.equal(losses.detach(), plain(tokens, targets).detach())

    plain.eval()
    wanted = plain(tokens, targets).sum()
    teacher = plain(tokens).detach().log_softmax(-1)
    exits = torch.zeros((), dtype=torch.float64)
    for times in range(1, loop["times"]):
        plain.recursion.times = times
        if distill:
            student = plain(tokens).log_softmax(-1)
            exits = exits + (teacher.exp() * (teacher - student)).sum()
        else:
            exits = exits + plain(tokens, targets).sum()
    for a, b in zip(found, gradients(plain, wanted + 0.3 * exits), strict=True):
        assert relative_error(a, b) < 1e-9
    logged = model.recursion.metrics()["exit_loss"]
    assert logged == pytest.approx(exits.item() / tokens.numel())


def test_a_weight_of_0_and_evaluation_change_no_bit():
    tokens, targets = torch.randint(VOCAB, (2, 2, 11))
    found = []
    for recursion in (RECURRENT_DEPTH, {**RECURRENT_DEPTH, "exit_weight": 0.0}):
        model = make(recursion)
        model.begin_step(0, 1)
        losses = model(tokens, targets)
        found.append([losses.detach(), *gradients(model, losses.sum())])
        assert "exit_loss" not in model.recursion.metrics()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    weighted = make({**RECURRENT_DEPTH, "exit_weight": 0.5}).eval()
    assert torch.equal(weighted(tokens, targets), make(RECURRENT_DEPTH).eval()(tokens, targets))


def test_passes_without_gradients_teach_the_head_alone():
    loop = {**RECURRENT_DEPTH, "coda": 0, "normalize_state": False}
    kept = make({**loop, "backprop_last": 1, "exit_weight": 1.0}, tie_embeddings=False)
    without = make({**loop, "backprop_last": 1}, tie_embeddings=False)
    tokens, targets = torch.randint(VOCAB, (2, 2, 9))
    both = []
    for model in (kept, without):
        model.begin_step(0, 1)
        gradients(model, model(tokens, targets).sum())
        both.append({n: p.grad for n, p in model.named_parameters()})
    for name, gradient in both[0].items():
        same = torch.equal(gradient, both[1][name])
        assert same != (name in ("head.weight", "final_norm.weight")), name


def test_divergence_by_hand():
    teacher, logits = torch.randn(2, 5, 7, dtype=torch.float64)
    logits.requires_grad_()
    p = teacher.softmax(-1)
    wanted = (p * (teacher.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)
    found = sharded_divergence(teacher, logits)
    assert torch.allclose(found, wanted)
    weights = torch.randn(5, dtype=torch.float64)
    gradient = torch.autograd.grad((found * weights).sum(), logits)[0]
    assert torch.allclose(gradient, torch.autograd.grad((wanted * weights).sum(), logits)[0])


def test_flops_of_training_count_the_outputs_of_earlier_passes():
    loop = {"prelude": 1, "coda": 1, "times": 4}
    plain = count_model(settings(loop), VOCAB, 16)
    exits = count_model(settings({**loop, "exit_weight": 0.1}), VOCAB, 16)
    outside = plain.flops_per_token - 4 * plain.loop_flops
    # What is outside: two equal blocks and the head.
    output = (outside - 2 * VOCAB * 16) // 2 + 2 * VOCAB * 16
    assert exits.training_flops() == plain.training_flops() + 3 * 3 * output
    assert exits.flops_per_token == plain.flops_per_token


def test_a_model_without_exits_starts_one_with_them():
    plain, taught = make(RECURRENT_DEPTH), make({**RECURRENT_DEPTH, "exit_weight": 0.1})
    with torch.no_grad():
        plain.recursion.adapter.add_(1.0)
    fill_from(taught, plain, InitializeConfig("x"), "runs/plain")
    assert torch.equal(taught.recursion.adapter, plain.recursion.adapter)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"exit_weight": -0.1}, "exit_weight is -0.1, expected at least 0"),
        ({"exit_distill": True}, "exit_distill is true, but .*exit_weight is 0, expected it above"),
        ({"exit_weight": 0.1, "halting": True}, "exit_weight is 0.1 with halting"),
        ({"exit_weight": math.nan}, "exit_weight is nan"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        settings({"times": 2, **changes})
    assert dataclasses.replace(settings({"times": 2}).recursion, exit_weight=0.1).exit_weight
