"""Mamba-3 against its recurrence, step by step in float64, and what it is a form of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import registry
from pretrain.nn.mixers.mamba3 import running_angles
from pretrain.ops import linear_attention
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("mamba3", HIDDEN, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # biases that differ, and steps long enough to see an angle turn
        for name in ("b_bias", "c_bias", "dt_bias"):
            parameter = getattr(layer, name)
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
        layer.dt_bias.add_(2)
    return layer


def rotate(x, angles):
    """Adjacent pairs of x [H, N] as complex numbers; as many as there are angles [H, R]."""
    turned = 2 * angles.shape[-1]
    pairs = torch.view_as_complex(x[:, :turned].unflatten(-1, (-1, 2)).contiguous())
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([torch.view_as_real(pairs).flatten(-2), x[:, turned:]], -1)


def definition(layer, x, lengths):
    """The public module's step over sequences x [T, d], each from a state of zeros."""
    config, heads = layer.config, layer.num_heads

    def read(name):
        return x @ getattr(layer, f"{name}_proj").weight.T

    z, inner = (read(name).unflatten(-1, (heads, -1)) for name in "zx")
    keys = []
    for name in "bc":
        key = read(name).unflatten(-1, (config.num_groups, -1))
        key = key * torch.rsqrt(key.square().mean(-1, keepdim=True) + config.norm_eps)
        key = (key * getattr(layer, f"{name}_norm")).repeat_interleave(
            heads // config.num_groups, 1
        )
        keys.append(key + getattr(layer, f"{name}_bias"))
    b, c = keys
    step = F.softplus(read("dt") + layer.dt_bias)
    rate = -F.softplus(read("a")).clamp_min(1e-4)
    trapezoid = torch.sigmoid(read("trapezoid"))
    angle = torch.tanh(read("angle")) if config.num_angles else x[:, :0]
    outputs, token = [], 0
    for length in lengths:
        state = x.new_zeros(heads, config.state_size, config.head_dim)
        theta, earlier = x.new_zeros(heads, config.num_angles), torch.zeros_like(state)
        for t in range(token, token + length):
            theta = theta + math.pi * angle[t] * step[t][:, None]
            write = rotate(b[t], theta)[..., None] * inner[t][:, None]
            decay = torch.exp(rate[t] * step[t])
            old, new = (1 - trapezoid[t]) * step[t] * decay, trapezoid[t] * step[t]
            state = decay[:, None, None] * state
            state = state + old[:, None, None] * earlier + new[:, None, None] * write
            read_out = torch.einsum("hn,hnp->hp", rotate(c[t], theta), state)
            outputs.append(read_out + layer.D[:, None] * inner[t])
            earlier = write
        token += length
    y = torch.stack(outputs) * F.silu(z)
    return y.flatten(1) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"head_dim": 8, "state_size": 8, "chunk_size": 4},
        {"head_dim": 8, "state_size": 6, "num_groups": 2, "rope_fraction": 1},
        {"head_dim": 12, "state_size": 5, "rope_fraction": 0},
    ],
)
def test_outputs_and_gradients_are_those_of_the_recurrence(settings):
    layer = build(**settings)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-10
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-9


def test_a_state_of_several_sequences_is_gone_on_from():
    """Also where one of them has no tokens in one of the calls."""
    layer = build(head_dim=8, state_size=8)
    x = torch.randn(30, 1, HIDDEN, dtype=torch.float64)
    a, b, c = x.split([12, 7, 11])
    whole, final = layer(torch.cat([a, b, c]), sequences=Sequences.from_lengths([12, 7, 11]))
    first = torch.cat([a[:5], c[:1]])
    y, state = layer(first, sequences=Sequences.from_lengths([5, 0, 1]))
    rest = torch.cat([a[5:], b, c[1:]])
    z, last = layer(rest, sequences=Sequences.from_lengths([7, 7, 10]), state=state)
    found = torch.cat([y[:5], z[:14], y[5:], z[14:]])
    assert relative_error(found, whole) < 1e-10
    for name, values in final.items():
        assert relative_error(last[name], values) < 1e-10


def test_without_what_is_new_it_is_mamba2s_core():
    layer = build(head_dim=8, state_size=8, rope_fraction=0)
    heads = layer.num_heads
    with torch.no_grad():
        layer.trapezoid_proj.weight.zero_()
        layer.trapezoid_proj.weight[:, 0] = 100.0  # times an input of 1: all weight on the present
        layer.b_bias.zero_()
        layer.c_bias.zero_()
        layer.D.zero_()
        layer.z_proj.weight.zero_()
        layer.z_proj.weight[:, 0] = 50.0  # SiLU(50) = 50
    x = torch.randn(40, 2, HIDDEN, dtype=torch.float64)
    x[..., 0] = 1
    found, _ = layer(x)
    v = layer.x_proj(x).transpose(0, 1).unflatten(-1, (heads, -1))
    c, b = (
        F.rms_norm(getattr(layer, f"{n}_proj")(x), (8,), eps=1e-5).transpose(0, 1)[:, :, None]
        for n in "cb"
    )
    step = F.softplus(layer.dt_proj(x) + layer.dt_bias).transpose(0, 1)
    decay = -F.softplus(layer.a_proj(x)).transpose(0, 1) * step
    y, _ = linear_attention(
        c.expand(-1, -1, heads, -1),
        b.expand(-1, -1, heads, -1),
        v * step[..., None],
        log_decay=decay,
        scale=1.0,
    )
    expected = 50 * layer.o_proj(y.flatten(2).transpose(0, 1))
    assert relative_error(found, expected) < 1e-10


def test_constant_angles_are_rotary_positions():
    turns = torch.tensor([0.3, 2.0, -1.1]).double().expand(50, 2, 3)
    angles, last = running_angles(turns, Sequences.from_lengths([33, 17]), torch.zeros(2, 2, 3))
    positions = torch.cat([torch.arange(1, 34), torch.arange(1, 18)])[:, None, None]
    assert torch.allclose(angles.cos(), (positions * turns).cos(), atol=1e-12)
    assert torch.allclose(angles.sin(), (positions * turns).sin(), atol=1e-12)
    assert torch.allclose(last, angles[[32, 49]], atol=1e-12)
    assert bool((angles.abs() <= math.pi + 1e-9).all())


def test_angles_stay_exact_in_float32_over_many_turns():
    generator = torch.Generator().manual_seed(4)
    turns = 3 * torch.rand(8192, 1, 4, generator=generator)  # 12,000 radians
    angles, _ = running_angles(turns, Sequences.from_lengths([8192]), torch.zeros(1, 1, 4))
    exact = turns.double().cumsum(0)
    assert float((angles.double().cos() - exact.cos()).abs().max()) < 3e-5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 5}, "num_groups is 5, which does not divide the 4 heads"),
        (
            {"rope_fraction": 0.3},
            "state_size \\* rope_fraction / 2 is 0.6, expected a whole number",
        ),
        ({"head_dim": 7}, "hidden_size \\* expand / head_dim is 6.85714, expected a whole number"),
    ],
)
def test_sizes_that_do_not_fit_are_named(settings, message):
    kind: Any = registry()["mamba3"]
    with pytest.raises(ValueError, match=message):
        kind.check(kind.config_class(**settings).resolve(HIDDEN), HIDDEN)
