"""Mamba against its equations, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.mamba import selective_scan
from pretrain.ops import diagonal_scan, linear_attention
from tests.helpers.live_memory import LiveMemory
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import small_layer

HIDDEN, LENGTHS = 24, [5, 1, 37, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("mamba", HIDDEN, **settings)
    return layer


def normal(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def definition(layer, x, lengths):
    """The equations over sequences, each from a state of zeros."""
    outputs = []
    for part in x.split(lengths):
        u, z = part @ layer.x_proj.weight.T, part @ layer.z_proj.weight.T
        taps = layer.config.conv_size
        if taps:
            padded = F.pad(u.T, (taps - 1, 0))
            u = F.conv1d(padded, layer.x_conv[:, None], layer.x_conv_bias, groups=len(u.T)).T
        u = F.silu(u)
        step = F.softplus(u @ layer.dt_down.T @ layer.dt_up.T + layer.dt_bias)
        b, c = u @ layer.b_weight.T, u @ layer.c_weight.T
        h, rate = torch.zeros_like(layer.A_log), -layer.A_log.exp()
        for t in range(len(part)):
            h = (step[t][:, None] * rate).exp() * h + (step[t] * u[t])[:, None] * b[t]
            outputs.append((h @ c[t] + layer.D * u[t]) * F.silu(z[t]))
    return torch.stack(outputs) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "settings", [{}, {"expand": 1.5, "state_size": 5, "dt_rank": 3, "conv_size": 0}]
)
def test_outputs_and_gradients_are_those_of_the_equations(settings):
    layer, x = build(**settings), normal(sum(LENGTHS), HIDDEN).requires_grad_()
    with torch.no_grad():
        layer.dt_bias += 3  # steps of some size
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-12
    leaves, weights = [x, *layer.parameters()], normal(*expected.shape, seed=4)
    for one, other in zip(
        torch.autograd.grad((found[:, 0] * weights).sum(), leaves),
        torch.autograd.grad((expected * weights).sum(), leaves),
        strict=True,
    ):
        assert relative_error(one, other) < 1e-10


def test_its_recurrence_is_a_diagonal_scan_of_all_states():
    channels, size, total = 6, 4, sum(LENGTHS)
    v, b, c = normal(1, total, channels), normal(1, total, size), normal(1, total, size, seed=5)
    log_decay = -normal(1, total, channels, size).abs()
    state = normal(len(LENGTHS), channels, size, 1)
    leaves = [t.requires_grad_() for t in (v, b, c, log_decay, state)]
    ends = torch.tensor([0, *LENGTHS]).cumsum(0)
    found = selective_scan(
        v, log_decay, b, c, initial_state=state, sequences=Sequences(ends), chunk_size=8
    )
    inputs = v[..., None] * b[:, :, None]
    h, last = diagonal_scan(
        None,
        inputs.flatten(2),
        state.flatten(1),
        ends,
        log_decay=log_decay.flatten(2),
        backend="sequential",
    )
    y = torch.einsum("btin,btn->bti", h.unflatten(2, (channels, size)), c)
    expected = y, last.unflatten(1, (channels, size))[..., None]
    gradients = []
    for output, end in (found, expected):
        loss = output.sin().sum() + end.cos().sum()
        gradients.append([output, end, *torch.autograd.grad(loss, leaves)])
    for one, other in zip(*gradients, strict=True):
        assert relative_error(one, other) < 1e-12


def test_one_decay_for_the_channels_of_a_head_makes_it_mamba_2s():
    heads, dim, size = 2, 3, 4
    v, b, c = normal(2, 30, heads * dim), normal(2, 30, size), normal(2, 30, size, seed=5)
    log_decay = -normal(2, 30, heads).abs()
    found, _ = selective_scan(
        v, log_decay.repeat_interleave(dim, 2)[..., None].expand(-1, -1, -1, size), b, c
    )
    b, c = (t[:, :, None].expand(-1, -1, heads, -1) for t in (b, c))
    expected, _ = linear_attention(
        c, b, v.unflatten(2, (heads, dim)), log_decay=log_decay, scale=1.0
    )
    assert relative_error(found, expected.flatten(2)) < 1e-13


def test_short_steps_keep_the_state_and_long_ones_forget_it():
    layer, x = build().float(), normal(60, 1, HIDDEN).float()
    start = {key: value.float() for key, value in layer.init_state(1).items()}
    start["recurrent"] += 1
    with torch.no_grad():
        layer.dt_bias.fill_(-60)
        _, kept = layer(x, state=start)
        layer.dt_bias.fill_(50)
        layer.dt_up.zero_()
        y, forgot = layer(x, state=start)
        _, recent = layer(x[-4:])  # as far as the convolution sees
    assert torch.allclose(kept["recurrent"], start["recurrent"], atol=1e-6)
    assert bool(y.isfinite().all())
    assert relative_error(forgot["recurrent"], recent["recurrent"]) < 1e-6


def test_the_backward_pass_computes_states_again():
    layer, x = build(state_size=64), normal(256, 1, HIDDEN).requires_grad_()
    with LiveMemory() as memory:
        y, _ = layer(x)
    states = 256 * layer.width * 64 * 8  # bytes of one number for each token, channel and state
    assert memory.peak > 3 * states
    assert memory.live < states
    y.sum().backward()


def test_it_starts_as_published():
    layer = build(state_size=4)
    assert torch.equal(layer.A_log.exp().round(), torch.arange(1.0, 5).double().expand(48, 4))
    assert float(layer.dt_up.detach().abs().max()) <= layer.config.dt_rank**-0.5
    assert float(layer.dt_up.detach().std()) > 0.4 * layer.config.dt_rank**-0.5
    step = F.softplus(layer.dt_bias.detach())
    assert float(step.min()) >= 1e-4
    assert float(step.max()) <= 0.101
