"""Layers of diagonal plus low rank against their equations, step by step in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.layer_checks import build, check_equations, moved

HIDDEN = 24
pytestmark = pytest.mark.usefixtures("processes")


def weight(x, layer, name):
    return x @ getattr(layer, name).weight.T


def convolved(x, layer, name):
    """SiLU of the causal convolution over q, k or v ``[T, width]``, if there is one."""
    x, taps = weight(x, layer, f"{name}_proj"), getattr(layer, f"{name}_conv", None)
    if taps is None:
        return F.silu(x)
    size = taps.shape[1]
    before = torch.cat([x.new_zeros(size - 1, x.shape[1]), x])
    return F.silu(sum(before[j : j + len(x)] * taps[:, j] for j in range(size)))


def unit(x):
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def rms_norm(x, layer):
    size = x.square().mean(-1, keepdim=True) + layer.config.norm_eps
    return x / size.sqrt() * layer.norm


def steps(transition, written, read):
    """o_t of S_t = transition_t S_{t-1} + written_t, by head: [T, H, V]."""
    state, outputs = torch.zeros_like(written[0]), []
    for a, w, q in zip(transition, written, read, strict=True):
        state = a @ state + w
        outputs.append(torch.einsum("hk,hkv->hv", q, state))
    return torch.stack(outputs)


def outer(a, b):
    return a[..., :, None] * b[..., None, :]


def gdn2(layer, x):
    heads, config = layer.num_heads, layer.config

    def split(y):
        return y.unflatten(-1, (heads, -1))

    q, k, v = (split(convolved(x, layer, name)) for name in "qkv")
    q, k = unit(q) * config.head_dim**-0.5, unit(k)
    rate = F.softplus(weight(weight(x, layer, "a_down"), layer, "a_up") + layer.dt_bias)
    decay = (-layer.A_log.exp()[:, None] * split(rate)).exp()
    erase = (1 + config.allow_neg_eigval) * split(weight(x, layer, "b_proj")).sigmoid()
    write = split(weight(x, layer, "w_proj")).sigmoid()
    keep = torch.eye(config.head_dim, dtype=x.dtype) - outer(k, erase * k)
    o = rms_norm(steps(keep * decay[..., None, :], outer(k, write * v), q), layer)
    gate = weight(weight(x, layer, "g_down"), layer, "g_up") + layer.g_bias
    return weight(o.flatten(1) * gate.sigmoid(), layer, "o_proj")


def comba(layer, x):
    heads, config = layer.num_heads, layer.config
    q, k, v = (convolved(x, layer, name).unflatten(-1, (heads, -1)) for name in "qkv")
    decay = (-layer.A_log.exp() * F.softplus(weight(x, layer, "a_proj") + layer.dt_bias)).exp()
    beta = weight(x, layer, "b_proj").sigmoid()[..., None, None]
    scale = layer.c.sigmoid()[:, None] if config.erase_scale else 1.0
    if config.correction is not None:
        q = q - layer.d[:, None] * scale * k
    q, k = unit(q) * config.head_dim**-0.5, unit(k)
    transition = decay[..., None, None] * torch.eye(config.head_dim, dtype=x.dtype)
    transition = transition - beta * outer(k, scale * k)
    o = rms_norm(steps(transition, beta * outer(k, v), q), layer)
    return weight(o.flatten(1) * weight(x, layer, "g_proj").sigmoid(), layer, "o_proj")


@pytest.mark.parametrize(
    "settings",
    [{"correction": 0.02}, {"erase_scale": False, "correction": None, "conv_size": 0}],
)
def test_comba(settings):
    layer = build("comba", HIDDEN, **settings)
    if "d" in dict(layer.named_parameters()):
        assert layer.d.tolist() == pytest.approx([settings["correction"]] * layer.num_heads)
    check_equations(moved(layer), HIDDEN, comba)


@pytest.mark.parametrize(
    "settings", [{}, {"expand_v": 1.5, "conv_size": 0, "allow_neg_eigval": True, "chunk_size": 4}]
)
def test_gated_deltanet_2(settings):
    check_equations(moved(build("gdn2", HIDDEN, **settings)), HIDDEN, gdn2)


def test_gated_deltanet_2_with_one_gate_for_all_channels_is_kimi_delta_attention():
    one, other = build("kda", HIDDEN), build("gdn2", HIDDEN)
    heads, dim = one.num_heads, one.config.head_dim
    found = dict(other.named_parameters())
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            if name != "b_proj.weight":
                found[name].copy_(parameter)
        for name in ("b_proj", "w_proj"):
            gates = one.b_proj.weight[:, None].expand(heads, dim, HIDDEN)
            getattr(other, name).weight.copy_(gates.flatten(0, 1))
    x = torch.randn(40, 2, HIDDEN, generator=torch.Generator().manual_seed(4)).double()
    assert torch.allclose(one(x)[0], other(x)[0], atol=1e-12, rtol=0)
