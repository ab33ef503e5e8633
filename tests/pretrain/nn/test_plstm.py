"""pLSTM, the layer, against its equations token by token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.common.errors import ConfigError
from pretrain.config import ModelConfig
from pretrain.data.sequences import Sequences
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 11]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    layer = small_layer("plstm", HIDDEN, **settings)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # transitions that differ from token to token
        layer.t_proj.weight.copy_(torch.randn(layer.t_proj.weight.shape, generator=generator) / 4)
        layer.l_bias.sub_(1)
    return layer


def convolved(layer, name, x):
    y = x @ getattr(layer, f"{name}_proj").weight.T
    weight = getattr(layer, f"{name}_conv", None)
    if weight is not None:
        taps = weight.shape[1]
        y = F.conv1d(F.pad(y.T, (taps - 1, 0))[None], weight[:, None], groups=len(weight))[0].T
    return F.silu(y).unflatten(-1, (layer.num_heads, -1))


def transitions(layer, x):
    """T of every token and head, its orthogonal factors by torch's matrix exponential."""
    size, raw = layer.config.transition_size, x @ layer.t_proj.weight.T
    raw = raw.unflatten(-1, (layer.num_heads, -1))
    middle = torch.diag_embed(torch.tanh(5 * (raw[..., :size] + layer.l_bias)))
    if size == 1:
        return middle
    free = (raw[..., size:] + layer.a_bias).unflatten(-1, (2, size, size))
    left, right = (torch.matrix_exp(a - a.transpose(-1, -2)) for a in free.unbind(-3))
    return left @ middle @ right


def definition(layer, x):
    """One document from a state of zeros."""
    config, size = layer.config, layer.config.transition_size
    q, k = (convolved(layer, n, x) for n in "qk")
    v = (x @ layer.v_proj.weight.T).unflatten(-1, (layer.num_heads, size, -1))
    turn = transitions(layer, x)
    source, mark, direct = (torch.sigmoid(getattr(layer, f"{n}_gate")) for n in "smd")
    state = x.new_zeros(layer.num_heads, config.head_dim, *v.shape[-2:])
    outputs = []
    for t in range(len(x)):
        read = torch.einsum("hij,hk,hkjp->hip", mark, q[t], state)
        own = torch.einsum("hij,hk,hk,hjp->hip", direct, q[t], k[t], v[t])
        outputs.append((read + own) * config.head_dim**-0.5)
        state = torch.einsum("hij,hkjp->hkip", turn[t], state)
        state = state + torch.einsum("hk,hij,hjp->hkip", k[t], source, v[t])
    y = torch.stack(outputs).flatten(2)
    y = y * (y.square().mean(-1, keepdim=True) + config.norm_eps).rsqrt() * layer.norm
    return (y.flatten(1) + x @ layer.p_proj.weight.T) @ layer.o_proj.weight.T


@pytest.mark.parametrize(
    "settings",
    [
        {"chunk_size": 4},
        {"num_heads": 3, "transition_size": 2, "conv_size": 0},
        {"num_heads": 3, "transition_size": 1},
    ],
)
def test_outputs_and_gradients_are_those_of_the_equations(settings):
    layer = build(**settings)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = torch.cat([definition(layer, part) for part in x.split(LENGTHS)])
    assert relative_error(found[:, 0], expected) < 1e-10
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 1e-9


def test_no_transition_makes_a_state_larger():
    layer = build(num_heads=2)
    x = 100 * torch.randn(50, HIDDEN, dtype=torch.float64)
    sizes = torch.linalg.matrix_norm(transitions(layer, x), 2)
    assert float(sizes.detach().max()) < 1 + 1e-9


def test_parts_begin_different():
    """Equal ones would get equal gradients for ever."""
    layer = build(num_heads=2)
    y, _ = layer(torch.randn(20, 1, HIDDEN, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.square().sum(), layer.a_bias)
    assert float(gradient.abs().max()) > 1e-6


def test_a_size_that_does_not_divide_a_head_is_refused():
    with pytest.raises(ConfigError, match="transition_size is 4, which does not divide head_dim 6"):
        ModelConfig("plstm", 24, mixers={"plstm": {"head_dim": 6, "transition_size": 4}})
