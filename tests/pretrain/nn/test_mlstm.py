"""mLSTM against its equations without a stabilizer, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.mlstm import _stabilizer
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("mlstm", HIDDEN, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # gates that differ from token to token
        for gate in (layer.i_proj, layer.f_proj):
            gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator))
    return layer


def definition(layer, x, lengths):
    """The layer of xLSTM-7B over sequences, each from a state of zeros."""
    config, heads = layer.config, layer.num_heads
    q, k, v = ((x @ getattr(layer, f"{n}_proj").weight.T).unflatten(-1, (heads, -1)) for n in "qkv")
    i, f = (
        x @ gate.weight.T + bias
        for gate, bias in ((layer.i_proj, layer.i_bias), (layer.f_proj, layer.f_bias))
    )
    if config.gate_cap is not None:
        i, f = (config.gate_cap * torch.tanh(gate / config.gate_cap) for gate in (i, f))
    outputs, token = [], 0
    for length in lengths:
        c = x.new_zeros(heads, config.key_dim, config.head_dim)
        n = x.new_zeros(heads, config.key_dim)
        for t in range(token, token + length):
            forget, write = torch.sigmoid(f[t])[:, None], i[t].exp()[:, None] * k[t]
            c = forget[..., None] * c + write[..., None] * v[t][:, None]
            n = forget * n + write
            read = q[t] * config.key_dim**-0.5
            divisor = (read * n).sum(-1).abs().clamp_min(1.0)[:, None]
            outputs.append(torch.einsum("hk,hkv->hv", read, c) / divisor)
        token += length
    y = F.layer_norm(torch.stack(outputs), (config.head_dim,), eps=config.norm_eps).flatten(1)
    return (torch.sigmoid(x @ layer.g_proj.weight.T) * y * layer.norm) @ layer.o_proj.weight.T


@pytest.mark.parametrize("settings", [{}, {"num_heads": 3, "gate_cap": None, "chunk_size": 4}])
def test_outputs_and_gradients_are_those_of_the_equations(settings):
    layer = build(**settings)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    # The 1e-6 beside the divisor stands for 1e-6 e^m of it, which the equations do not have.
    assert relative_error(found[:, 0], expected) < 2e-5
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 2e-4


def test_the_stabilizer_is_its_recurrence_in_every_sequence():
    generator = torch.Generator().manual_seed(6)
    i, log_f = torch.randn(2, 1, sum(LENGTHS) + 3, 2, generator=generator).double() * 4
    log_f = F.logsigmoid(log_f)
    before = torch.randn(len(LENGTHS) + 1, 2, generator=generator).double() * 4
    lengths = [*LENGTHS, 3]
    m, last, change = _stabilizer(i, log_f, Sequences.from_lengths(lengths), before)
    token = 0
    for number, length in enumerate(lengths):
        now = before[number]
        for t in range(token, token + length):
            earlier, now = now, torch.maximum(log_f[0, t] + now, i[0, t])
            assert torch.allclose(m[0, t], now, atol=1e-12)
            assert torch.allclose(change[0, t], earlier - now, atol=1e-12)
        assert torch.allclose(last[number], now, atol=1e-12)
        token += length


def test_gates_of_any_size_are_finite_in_float32():
    layer = build(gate_cap=None).float()
    x = torch.randn(40, 1, HIDDEN, generator=torch.Generator().manual_seed(4), requires_grad=True)
    with torch.no_grad():
        layer.i_proj.weight.mul_(40)
        layer.f_proj.weight.mul_(40)
    y, state = layer(x)
    y.square().sum().backward()
    values = [y, x.grad, *state.values(), *(p.grad for p in layer.parameters())]
    assert float(state["max"].abs().max()) > 100
    assert all(bool(value.isfinite().all()) for value in values)


def test_many_tokens_in_float32_are_those_in_float64():
    layer = build(num_heads=2)
    x = torch.randn(2048, 1, HIDDEN, generator=torch.Generator().manual_seed(5)).double()
    expected, _ = layer(x)
    found, _ = layer.float()(x.float())
    error = (found.double() - expected).norm() / expected.norm()
    assert error < 1e-4
