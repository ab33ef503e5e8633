"""Aaren against attention with one query for all tokens."""

from __future__ import annotations

import pytest
import torch

from pretrain.data.sequences import Sequences
from pretrain.ops import attention
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error, small_layer

HIDDEN, LENGTHS = 24, [5, 1, 17, 9]
pytestmark = pytest.mark.usefixtures("processes")


def inputs(total):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(total, HIDDEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("settings", [{}, {"num_heads": 3, "head_dim": 5, "chunk_size": 4}])
def test_outputs_and_gradients_are_those_of_attention(settings):
    layer = small_layer("aaren", HIDDEN, **settings)
    x = inputs(sum(LENGTHS)).requires_grad_()
    sequences = Sequences.from_lengths(LENGTHS)
    found, _ = layer(x[:, None], sequences=sequences)
    k, v = (
        (x @ projection.weight.T).unflatten(-1, (layer.num_heads, -1))[None]
        for projection in (layer.k_proj, layer.v_proj)
    )
    y = attention(layer.query.expand_as(k), k, v, sequences=sequences)
    expected = y[0].flatten(1) @ layer.o_proj.weight.T
    assert largest_error(found[:, 0], expected, [x, *layer.parameters()]) < 1e-12


def test_the_state_is_a_mean_and_the_sum_of_its_weights():
    layer = small_layer("aaren", HIDDEN)
    x = inputs(40)
    _, state = layer(x[:, None])
    k, v = (
        (x @ projection.weight.T).unflatten(-1, (layer.num_heads, -1))
        for projection in (layer.k_proj, layer.v_proj)
    )
    scores = (k * layer.query).sum(-1) * layer.config.head_dim**-0.5
    mean = torch.einsum("sh,shd->hd", scores.softmax(0), v)
    assert relative_error(state["mean"][0, :, 0], mean) < 1e-13
    assert relative_error(state["log_sum"][0, :, 0], scores.logsumexp(0)) < 1e-13
