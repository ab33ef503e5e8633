"""LightNet against a softmax over the past for each key channel, written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def definition(layer, x, lengths):
    """The layer over sequences, each alone."""
    heads, outputs = layer.num_heads, []
    for part in x.split(lengths):
        q, k, v = (
            F.linear(part, getattr(layer, f"{name}_proj").weight).unflatten(-1, (heads, -1))
            for name in "qkv"
        )
        q = F.silu(q) * layer.key_dim**-0.5
        for t in range(len(part)):
            share = torch.softmax(k[: t + 1], 0)  # [s, H, K], over s
            outputs.append(torch.einsum("hk,shk,shv->hv", q[t], share, v[: t + 1]))
    y = torch.stack(outputs).flatten(1)
    y = y * (y.square().mean(-1, keepdim=True) + layer.config.norm_eps).rsqrt() * layer.norm
    gate = F.silu(x @ layer.g_down.weight.T @ layer.g_up.weight.T)
    return (y * gate) @ layer.o_proj.weight.T


def inputs(total):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"num_heads": 3, "head_dim": 5, "chunk_size": 4}])
def test_outputs_and_gradients_are_those_of_a_softmax(settings):
    layer = small_layer("lightnet", HIDDEN, **settings)
    x = inputs(sum(LENGTHS)).requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert largest_error(found[:, 0], expected, [x, *layer.parameters()]) < 1e-12


def test_equal_logits_are_the_causal_mean():
    layer = small_layer("lightnet", HIDDEN)
    with torch.no_grad():
        layer.k_proj.weight.zero_()
    x = inputs(40)
    _, state = layer(x[:, None])
    mean = F.linear(x.mean(0), layer.v_proj.weight).unflatten(0, (layer.num_heads, 1, -1))
    assert relative_error(state["recurrent"][0], mean.expand_as(state["recurrent"][0])) < 1e-13


def test_a_constant_added_to_a_channel_of_logits_changes_nothing():
    layer = small_layer("lightnet", HIDDEN)
    x = inputs(40)
    x[:, 0] = 1.0
    before, _ = layer(x[:, None])
    with torch.no_grad():
        layer.k_proj.weight[:, 0] += 3 * torch.randn(len(layer.k_proj.weight)).double()
    after, _ = layer(x[:, None])
    assert relative_error(after, before) < 1e-13


@pytest.mark.parametrize(("scale", "error"), [(3.0, 1e-5), (30.0, 1e-4)])
def test_float32_is_close_at_large_logits(scale, error):
    layer = small_layer("lightnet", HIDDEN)
    with torch.no_grad():
        layer.k_proj.weight.mul_(scale)
    x = inputs(1024)
    with torch.no_grad():
        expected, _ = layer(x[:, None])
        found, _ = layer.float()(x[:, None].float())
    assert float((found.double() - expected).norm() / expected.norm()) < error
