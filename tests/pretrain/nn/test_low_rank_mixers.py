"""Layers of diagonal plus low rank against their equations, step by step in float64."""

from __future__ import annotations

import math

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


def first_values(x):
    """Values that stand for another layer's."""
    return torch.sin(3 * x)


def rwkv7(layer, x):
    heads, dim = layer.num_heads, layer.config.head_dim

    def split(y):
        return y.unflatten(-1, (heads, dim))

    def low_rank(name, y, inner):
        return inner(y @ layer.down[name].weight.T) @ layer.up[name].weight.T

    before = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
    x_r, x_w, x_k, x_v, x_a, x_g = (
        x + getattr(layer, f"mix_{name}") * (before - x) for name in "rwkvag"
    )
    r, k, v = (weight(y, layer, f"{n}_proj") for y, n in ((x_r, "r"), (x_k, "k"), (x_v, "v")))
    decay = torch.exp(
        -math.exp(-0.5) * (layer.decay_bias + low_rank("w", x_w, torch.tanh)).sigmoid()
    )
    a = (layer.rate_bias + low_rank("a", x_a, lambda y: y)).sigmoid()
    gate = low_rank("g", x_g, torch.sigmoid)
    unit = split(k * layer.erase_scale)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    k = split(k * (1 + (a - 1) * layer.rate_share))
    if layer.later:
        share = layer.value_bias + low_rank("v", x_v, lambda y: y)
        v = v + (first_values(x) - v) * share.sigmoid()
    r, v = split(r), split(v)
    transition = torch.diag_embed(split(decay)) - outer(unit * split(a), unit)
    o = steps(transition, outer(k, v), r).flatten(1)
    eps = layer.config.norm_eps * dim
    o = F.group_norm(o, heads, layer.norm, layer.norm_bias, eps)
    o = o + ((r * k * split(layer.bonus)).sum(-1, keepdim=True) * v).flatten(1)
    return weight(o * gate, layer, "o_proj")


@pytest.mark.parametrize(
    "settings",
    [{"value_residual": False}, {"num_heads": 2, "head_dim": 4, "chunk_size": 4}],
)
def test_rwkv7(settings):
    number = 0 if settings.get("value_residual", True) else 1
    context = {"index": 1, "count": 3, "number": number}
    layer = moved(build("rwkv7", HIDDEN, context, **settings))
    check_equations(layer, HIDDEN, rwkv7)
    first: dict[str, torch.Tensor] = {}
    x = torch.ones(3, 1, HIDDEN, dtype=torch.float64)
    layer(x, first=first)
    assert list(first) == list(layer.first_values(layer.config, HIDDEN))


def test_a_later_rwkv7_mixes_the_values_of_the_first_into_its_own():
    layer = moved(build("rwkv7", HIDDEN, {"index": 1, "count": 3, "number": 1}))

    def run(x, **options):
        return layer(x, first={"v": first_values(x)}, **options)

    check_equations(layer, HIDDEN, rwkv7, run=run)
    alone = layer.num_parameters(layer.config, HIDDEN)
    added, _ = layer.added_later(layer.config, HIDDEN)
    assert sum(p.numel() for p in layer.parameters()) == alone + added


def test_rwkv7_starts_as_published():
    """The loops of the published code, over channels one by one."""
    hidden, index, count = 32, 2, 4
    context = {"index": index, "count": count, "number": 2}
    layer = build("rwkv7", hidden, context, head_dim=8)
    first, last = index / (count - 1), 1 - index / count
    exponents = [0.2, 0.9, 0.7, 0.7, 0.9, 0.2]  # x_r, x_w, x_k, x_v, x_a, x_g
    for n in range(hidden):
        linear = n / (hidden - 1) - 0.5
        zigzag = (n % 8 - 3.5) / 3.5
        zigzag = zigzag * abs(zigzag)
        decay = -6 + 6 * (n / (hidden - 1)) ** (1 + first**0.3)
        expected = [1 - (n / hidden) ** (e * last) for e in exponents]
        found = [getattr(layer, f"mix_{name}")[n].item() for name in "rwkvag"]
        assert found == pytest.approx(expected, abs=1e-6)
        for vector, value in (
            (layer.decay_bias, decay + 0.5 + 2.5 * zigzag),
            (layer.rate_bias, -0.19 + 0.3 * zigzag + 0.4 * linear),
            (layer.erase_scale, 0.71 - 0.1 * linear),
            (layer.value_bias, 0.73 - 0.4 * linear),
            (layer.rate_share, 1.02),
            (layer.bonus, -0.04),
            (layer.norm, ((index + 1) / count) ** 0.7),
        ):
            assert vector[n].item() == pytest.approx(value, abs=1e-5)
    eye = torch.eye(hidden, dtype=torch.float64)
    for name, gain in (("r", 1.0), ("k", 0.1), ("v", 1.0)):
        matrix = getattr(layer, f"{name}_proj").weight
        assert torch.allclose(matrix @ matrix.T, gain**2 * eye, atol=1e-5)
    for name in "wavg":
        up = layer.up[name].weight
        assert torch.allclose(up.T @ up, 0.01 * torch.eye(up.shape[1]).double(), atol=1e-5)
        assert not layer.down[name].weight.any()
    assert not layer.o_proj.weight.any()


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
