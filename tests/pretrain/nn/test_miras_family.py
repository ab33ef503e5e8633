"""Moneta, Yaad and Memora against their equations, token by token in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 24, [5, 1, 11]
pytestmark = pytest.mark.usefixtures("processes")


def build(name, **settings):
    kind = registry()[name]
    config = kind.config_class(**settings).resolve(HIDDEN)
    layer: Any = kind(config, LayerContext(HIDDEN, 0.3, 0.3, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    return layer


def convolved(layer, name, x):
    """SiLU of the causal convolution of a projection, [T, H, D]."""
    y = x @ getattr(layer, f"{name}_proj").weight.T
    weight = getattr(layer, f"{name}_conv", None)
    if weight is not None:
        taps = weight.shape[1]
        y = F.conv1d(F.pad(y.T, (taps - 1, 0))[None], weight[:, None], groups=len(weight))[0].T
    return F.silu(y).unflatten(-1, (layer.num_heads, -1))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def gate(layer, name, x):
    y = x @ getattr(layer, f"{name}_down").weight.T @ getattr(layer, f"{name}_up").weight.T
    return (y + getattr(layer, f"{name}_bias")).unflatten(-1, (layer.num_heads, -1))


def loss(name, config, error, threshold):
    if name == "moneta":
        return (error.square() + 1e-6).pow(config.p / 2).sum()
    if name == "yaad":
        return F.huber_loss(error, 0 * error, reduction="none", delta=1.0).sum()
    return error.square().sum()


def four_norm(a):
    return a / a.abs().pow(4).sum((-2, -1), keepdim=True).sqrt()


def definition(name, layer, x):
    """One document from its first token; thresholds of 1 alone, as torch's Huber loss has them."""
    config = layer.config
    q, k, v = (convolved(layer, n, x) for n in "qkv")
    q, k = unit(q), unit(k)
    decay, rate = torch.sigmoid(gate(layer, "a", x)), torch.sigmoid(gate(layer, "r", x))
    rate = rate * config.highest_rate
    matrices = [getattr(layer, f"memory_{i}") for i in range(len(config.shapes))]
    outputs = []

    def read(ws, y):
        if len(ws) == 1:
            return torch.einsum("hk,hkv->hv", y, ws[0])
        hidden = F.gelu(torch.einsum("hk,hkm->hm", y, ws[0]))
        return y + F.layer_norm(torch.einsum("hm,hmv->hv", hidden, ws[1]), y.shape[-1:])

    def weights(a):
        return {"moneta": four_norm, "yaad": lambda a: a, "memora": lambda a: a.softmax(-2)}[name](
            a
        )

    a = matrices
    if name == "memora":
        a = [m.log_softmax(-2) for m in a]
    first = latest = a
    for t in range(len(x)):
        ws = [weights(m) for m in first]
        error = read(ws, k[t]) - v[t]
        gradients = torch.autograd.grad(loss(name, config, error, 1.0), ws, create_graph=True)
        sides = [(decay[t][:, :, None], rate[t][:, :, None]), (decay[t][:, None], rate[t][:, None])]
        a = [d * m - r * g for m, g, (d, r) in zip(a, gradients, sides, strict=False)]
        if (t + 1) % config.chunk_size == 0:
            a = [m.log_softmax(-2) for m in a] if name == "memora" else a
            first = latest = a
        if name == "moneta":  # by the norm that the last whole chunk left
            ws = [
                m / b.abs().pow(4).sum((-2, -1), keepdim=True).sqrt()
                for m, b in zip(a, latest, strict=True)
            ]
        else:
            ws = [weights(m) for m in a]
        outputs.append(read(ws, q[t]))
    y = torch.stack(outputs)
    y = y * (y.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * layer.norm
    y = y.flatten(1) * F.silu(x @ layer.g_proj.weight.T)
    return y @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("moneta", {"chunk_size": 4, "expansion": 2}),
        ("moneta", {"chunk_size": 1, "memory": "linear", "p": 2.0, "conv_size": 0}),
        ("yaad", {"chunk_size": 4, "memory": "linear", "num_heads": 3}),
        ("memora", {"chunk_size": 3, "memory": "linear"}),
        ("memora", {"chunk_size": 2, "head_dim": 4, "expansion": 1}),
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations(name, settings):
    layer = build(name, gate_rank=3, **settings)
    if name == "yaad":
        with torch.no_grad():
            layer.t_up.weight.zero_()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = torch.cat([definition(name, layer, part) for part in x.split(LENGTHS)])
    assert relative_error(found[:, 0], expected) < 1e-10
    constant = ("t_down", "t_up", "t_bias")
    leaves = [x, *(p for n, p in layer.named_parameters() if not n.startswith(constant))]
    assert largest_error(found[:, 0], expected, leaves) < 1e-9


def test_a_token_sets_the_threshold_of_its_own_errors():
    layer = build("yaad", num_heads=2, memory="linear", chunk_size=1)
    x = torch.randn(9, 1, HIDDEN, dtype=torch.float64)
    y, _ = layer(x)
    with torch.no_grad():
        layer.t_bias.sub_(5)  # next to 0: errors hardly count
    near, state = layer(x)
    assert relative_error(near, y) > 1e-2
    with torch.no_grad():
        layer.t_bias.sub_(40)
        layer.a_bias.add_(40)  # nothing is forgotten, and nothing learned
    _, state = layer(x)
    assert float(state["memory_0_now"].detach().norm()) < 1e-8


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_gradients_through_many_chunks_are_bounded(name):
    """The defaults of an MLP memory, whose gradients can grow from chunk to chunk."""
    kind: Any = registry()[name]
    config = kind.config_class(head_dim=16, gate_rank=8).resolve(32)
    layer: Any = kind(config, LayerContext(32, 0.02, 0.02, current_context(torch.float32)))
    fill_parameters(layer, seed=1)
    x = torch.randn(800, 1, 32, generator=torch.Generator().manual_seed(5)).requires_grad_()
    y, _ = layer(x)
    (gradient,) = torch.autograd.grad(y[-16:].square().mean(), x)
    size = gradient.norm(dim=-1)[:, 0]
    assert float(size[:-16].max()) < 10 * float(size[-16:].max())
    assert float(size[:16].max()) > 0
