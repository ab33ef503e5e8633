"""MesaNet's layer against its equations, a direct solve for each token in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def convolved(layer, name, x):
    """SiLU of a causal convolution of one sequence, over length 1."""
    y, weight = F.linear(x, getattr(layer, f"{name}_proj").weight), getattr(layer, f"{name}_conv")
    width = weight.shape[1]
    padded = torch.cat([y.new_zeros(width - 1, y.shape[1]), y])
    y = F.silu(sum(padded[j : j + len(y)] * weight[:, j] for j in range(width)))
    y = y.unflatten(-1, (layer.num_heads, -1))
    return y * (y.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


def definition(layer, x, lengths):
    heads, dim, outputs = layer.num_heads, layer.config.head_dim, []
    ridge = torch.diag_embed((F.softplus(layer.ridge) + 0.25).view(heads, dim))
    for part in x.split(lengths):
        q, k = (convolved(layer, name, part) for name in "qk")
        v = F.linear(part, layer.v_proj.weight).unflatten(-1, (heads, -1))
        decay, beta = (
            torch.sigmoid(F.linear(part, projection.weight) + bias)[..., None, None]
            for projection, bias in ((layer.a_proj, layer.a_bias), (layer.b_proj, layer.b_bias))
        )
        phi, psi = x.new_zeros(2, heads, dim, dim)
        for t in range(len(part)):
            phi = decay[t] * phi + beta[t] * k[t, :, :, None] * k[t, :, None]
            psi = decay[t] * psi + beta[t] * k[t, :, :, None] * v[t, :, None]
            outputs.append((q[t, :, None] @ torch.linalg.inv(phi + ridge) @ psi)[:, 0])
    y = torch.stack(outputs)
    y = y * (y.square().mean(-1, keepdim=True) + layer.config.norm_eps).rsqrt() * layer.norm
    return y.flatten(1) @ layer.o_proj.weight.T


def test_outputs_and_gradients_are_those_of_direct_solves():
    layer = small_layer("mesa", HIDDEN, num_heads=3, head_dim=5, chunk_size=4)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    assert largest_error(found[:, 0], expected, [x, *layer.parameters()]) < 1e-10


@pytest.mark.parametrize(("floor", "start"), [(0.25, 1.0), (3.0, 4.0)])
def test_the_ridge_starts_at_one_or_above_its_floor(floor, start):
    layer = small_layer("mesa", HIDDEN, ridge_floor=floor)
    ridge = F.softplus(layer.ridge) + floor
    assert relative_error(ridge, torch.full_like(ridge, start)) < 1e-6


def test_few_iterations_come_close_and_more_come_closer():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, 1, HIDDEN, generator=generator, dtype=torch.float64)
    exact, _ = small_layer("mesa", HIDDEN, num_heads=1, head_dim=16, iterations=40)(x)
    errors = [
        relative_error(
            small_layer("mesa", HIDDEN, num_heads=1, head_dim=16, iterations=count)(x)[0], exact
        )
        for count in (1, 4, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2
