"""The quasi-LSTM against the LSTM that it is without its recurrent matrix, and its equations."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.sequences import Sequences
from pretrain.ops import rnn
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("quasi_lstm", HIDDEN, **settings)
    return layer


def perturbed(layer):
    """Biases that differ from channel to channel."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("bias"):
                parameter += torch.randn(parameter.shape, generator=generator)
    return layer


def inputs(total):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64).requires_grad_()


def gates(layer, x):
    return [
        x @ getattr(layer, f"{name}_proj").weight.T + getattr(layer, f"{name}_bias")
        for name in "ifzg"
    ]


def definition(layer, x, lengths):
    outputs = []
    for part in x.split(lengths):
        i, f, z, g = gates(layer, part)
        c = torch.zeros_like(i[0])
        for t in range(len(part)):
            c = torch.sigmoid(f[t]) * c + torch.sigmoid(i[t]) * torch.tanh(z[t])
            outputs.append(torch.sigmoid(g[t]) * torch.tanh(c))
    return torch.stack(outputs) @ layer.o_proj.weight.T + layer.o_bias


@pytest.mark.parametrize("expand", [1.0, 1.5])
def test_outputs_and_gradients_are_those_of_the_equations(expand):
    layer, x = perturbed(build(expand=expand)), inputs(sum(LENGTHS))
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found[:, 0], expected) < 1e-12
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-10


def test_it_is_an_lstm_without_a_recurrent_matrix():
    layer, x = build(), inputs(30)
    i, f, z, g = gates(layer, x)
    stacked = torch.stack([i, f - 1, z, g], 1)[None, :, :, None]  # [B, T, G, H, D]
    bias = torch.zeros(4, 1, HIDDEN, dtype=torch.float64)
    bias[1] = 1.0
    nothing = torch.zeros(1, HIDDEN, 4, HIDDEN, dtype=torch.float64)
    h, states = rnn(stacked, nothing, bias, cell="lstm", backend="recurrent")
    y, state = layer(x[:, None])
    expected = h[0].flatten(1) @ layer.o_proj.weight.T
    assert relative_error(y[:, 0], expected) < 1e-13
    assert relative_error(state["cell"], states[1][:, 0]) < 1e-13


def test_the_forget_gate_starts_open():
    assert torch.equal(build().f_bias, torch.ones(HIDDEN).double())
    assert torch.equal(build(forget_bias=-2.0).f_bias, torch.full((HIDDEN,), -2.0).double())
    assert not build().i_bias.any()
