"""HGRN against its equations, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_model
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.ops import linear_attention
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(index=1, count=4, **settings):
    kind = registry()["hgrn"]
    config = kind.config_class(**{"lower_bound": "own", **settings}).resolve(HIDDEN)
    context = LayerContext(HIDDEN, 0.3, 0.3, current_context(torch.float64), index, count)
    layer: Any = kind(config, context)
    fill_parameters(layer, seed=1)
    return layer


def inputs(total):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(total, 1, HIDDEN, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


def gates(layer, x, bound=None):
    """What goes into the recurrence, and its decays, of one sequence ``[T, d]``."""
    i, f = x @ layer.i_proj.weight.T, x @ layer.f_proj.weight.T
    if layer.config.conv_size:
        taps = layer.config.conv_size
        i, f = (
            F.conv1d(F.pad(t.T, (taps - 1, 0)), weight[:, None], groups=len(weight)).T
            for t, weight in ((i, layer.i_conv), (f, layer.f_conv))
        )
    bound = torch.sigmoid(layer.lower_bound) if bound is None else bound
    f = bound + (1 - bound) * torch.sigmoid(f)
    if not layer.config.complex_state:
        return (1 - f) * F.silu(i), f
    turn = torch.complex(torch.cos(layer.angle), torch.sin(layer.angle))
    return (1 - f) * torch.complex(F.silu(i[:, ::2]), F.silu(i[:, 1::2])), f * turn


def definition(layer, x, lengths, bound=None):
    outputs = []
    for part in x.split(lengths):
        c, f = gates(layer, part, bound)
        h = torch.zeros_like(c[0])
        for t in range(len(part)):
            h = f[t] * h + c[t]
            outputs.append(h)
    y = torch.stack(outputs)
    if layer.config.complex_state:  # real and imaginary parts in turn
        y = torch.stack([y.real, y.imag], -1).flatten(-2)
    y = y / (y.square().mean(-1, keepdim=True) + layer.config.norm_eps).sqrt() * layer.norm
    return (y * F.silu(x @ layer.g_proj.weight.T)) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [{}, {"expand": 1.5, "conv_size": 4}, {"complex_state": True, "expand": 0.5, "conv_size": 3}],
)
def test_outputs_and_gradients_are_those_of_the_equations(settings):
    layer, x = build(**settings), inputs(sum(LENGTHS))
    found, _ = layer(x, sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x[:, 0], LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-12
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-10


def test_layers_of_one_table_are_the_equations_with_the_tables_gradient():
    values = {
        "hidden_size": HIDDEN,
        "pattern": "hgrn attn 2*hgrn",
        "mixers": {"attn": {"num_heads": 2}, "hgrn": {"expand": 0.5}},
    }
    config = build_config(ModelConfig, values, "test")
    model: Any = build_model(config, 64, seed=1, dtype=torch.float64)
    table = model.tables["hgrn"]["lower_bounds"].weight
    with torch.no_grad():
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(3)))
    shares = table.softmax(0)
    bounds = shares.cumsum(0) - shares[:1]
    mixers = [model.blocks[number].mixer for number in (0, 2, 3)]
    x = inputs(sum(LENGTHS))
    found, expected = x, x[:, 0]
    for mixer, bound in zip(mixers, bounds, strict=True):
        found = mixer(found, sequences=Sequences.from_lengths(LENGTHS))[0]
        expected = definition(mixer, expected, LENGTHS, bound)
    assert relative_error(found[:, 0], expected) < 1e-12
    leaves = [x, table, *(p for mixer in mixers for p in mixer.parameters())]
    for one, other in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(expected.square().sum(), leaves),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-10


def test_its_state_is_that_of_linear_attention_with_a_head_for_each_channel():
    layer, x = build(), inputs(30)
    c, f = gates(layer, x[:, 0])
    one = torch.ones_like(c)[None, ..., None]
    options: dict[str, Any] = {"log_decay": f.log()[None], "scale": 1.0}
    _, expected = linear_attention(one, one, c[None, ..., None], **options)
    assert relative_error(layer(x)[1]["recurrent"], expected[..., 0, 0]) < 1e-12


def test_complex_states_without_an_angle_are_two_real_ones():
    layer, real, x = build(complex_state=True), build(), inputs(30)
    with torch.no_grad():
        assert layer.angle[0] == 1  # and falls as frequencies of rotary positions do
        assert layer.angle[12].item() == pytest.approx(0.01)
        layer.angle.zero_()
        real.f_proj.weight.copy_(layer.f_proj.weight)
        for part in range(2):
            real.i_proj.weight.copy_(layer.i_proj.weight[part::2])
            last = layer(x)[1]["recurrent"]
            assert relative_error(last[..., part], real(x)[1]["recurrent"]) < 1e-12


def test_bounds_rise_with_depth_and_a_bound_of_one_freezes_the_state():
    bounds = [torch.sigmoid(build(index, 4).lower_bound) for index in range(4)]
    assert torch.allclose(torch.stack(bounds)[:, 0], torch.tensor([0.01, 0.25, 0.5, 0.75]).double())
    layer, x = build(), inputs(30)
    state = {"recurrent": torch.randn(1, HIDDEN, dtype=torch.float64)}
    with torch.no_grad():
        layer.lower_bound.fill_(60.0)
    assert relative_error(layer(x, state=state)[1]["recurrent"], state["recurrent"]) < 1e-20
    with torch.no_grad():  # and one of 0 leaves a sigmoid alone
        layer.lower_bound.fill_(-200.0)
    x = x[:5]
    log_f = F.logsigmoid(x[:, 0] @ layer.f_proj.weight.T)
    _, last = layer(x, state=state)
    change = last["recurrent"] - layer(x)[1]["recurrent"]
    assert relative_error(change, state["recurrent"] * log_f.sum(0).exp()) < 1e-8
