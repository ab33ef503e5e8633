"""The first block of mLSTM against its equations without a stabilizer, step by step in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pretrain.common.config_loader import ConfigError
from pretrain.data.sequences import Sequences
from pretrain.library import mixer
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 12, [5, 1, 13, 6]
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    kind = registry()["mlstm_v1"]
    config: Any = kind.config_class(**settings).resolve(HIDDEN)
    layer: Any = kind(config, LayerContext(HIDDEN, 0.5, 0.3, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # gates that differ from token to token, a norm and skip that are not 1
        layer.gates.copy_(torch.randn(layer.gates.shape, generator=generator))
        for vector in (layer.norm, layer.skip):
            vector.copy_(torch.rand(vector.shape, generator=generator) + 0.5)
    return layer


def definition(layer, x, lengths):
    """The block over sequences, each from nothing."""
    config, heads, size = layer.config, layer.num_heads, layer.config.head_dim
    outputs, token = [], 0
    for length in lengths:
        rows = x[token : token + length]
        u, z = rows @ layer.u_proj.weight.T, rows @ layer.z_proj.weight.T
        c = u
        if config.conv_size:
            past = torch.cat([u.new_zeros(config.conv_size - 1, u.shape[1]), u])
            c = layer.u_conv_bias + sum(
                past[j : j + length] * layer.u_conv[:, j] for j in range(config.conv_size)
            )
        c = F.silu(c)

        def blocks(given, weight):
            whole = torch.block_diag(*weight)
            return (given @ whole).unflatten(-1, (heads, size))

        q, k, v = blocks(c, layer.q_blocks), blocks(c, layer.k_blocks), blocks(u, layer.v_blocks)
        weight = layer.gates.unflatten(0, (heads, 2)).unflatten(-1, (heads, 3, size))
        gates = torch.stack([q, k, v], 2)
        i = torch.einsum("thcd,ghcd->tg", gates, weight[:, 0]) + layer.i_bias
        f = torch.einsum("thcd,ghcd->tg", gates, weight[:, 1]) + layer.f_bias
        memory, normalizer = x.new_zeros(heads, size, size), x.new_zeros(heads, size)
        read = []
        for t in range(length):
            forget, write = torch.sigmoid(f[t])[:, None], i[t].exp()[:, None] * k[t]
            memory = forget[..., None] * memory + write[..., None] * v[t][:, None]
            normalizer = forget * normalizer + write
            query = q[t] * size**-0.5
            divisor = (query * normalizer).sum(-1).abs().clamp_min(1.0)[:, None]
            read.append(torch.einsum("hk,hkv->hv", query, memory) / divisor)
        y = F.layer_norm(torch.stack(read), (size,), eps=config.norm_eps).flatten(1) * layer.norm
        outputs.append(((y + layer.skip * c) * F.silu(z)) @ layer.o_proj.weight.T)
        token += length
    return torch.cat(outputs)


@pytest.mark.parametrize("settings", [{}, {"num_heads": 3, "block_size": 2, "conv_size": 0}])
def test_outputs_and_gradients_are_those_of_the_equations(settings):
    layer = build(chunk_size=4, **settings)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found, _ = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))
    expected = definition(layer, x, LENGTHS)
    # The 1e-6 beside the divisor stands for 1e-6 e^m of it, which the equations do not have.
    assert relative_error(found[:, 0], expected) < 2e-5
    leaves = [x, *layer.parameters()]
    assert largest_error(found[:, 0], expected, leaves) < 2e-4


def test_sizes_follow_the_width():
    config: Any = registry()["mlstm_v1"].config_class()
    for width, expected in [(1024, (4, 512)), (33, (1, 68)), (12, (3, 8))]:
        sizes = config.resolve(width)
        assert (sizes.num_heads, sizes.head_dim) == expected


def test_what_does_not_fit_is_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 2, "head_dim": 6}, "block_size is 4, which does not divide head_dim 6"),
        ({"expand": 1.3}, "hidden_size \\* expand is 15.6, expected a whole number"),
        ({"conv_size": -1}, "conv_size"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            mixer("mlstm_v1", hidden_size=HIDDEN, **settings)
