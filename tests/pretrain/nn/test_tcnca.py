"""The TCNCA-style block against its equations, token by token in float64."""

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
from pretrain.ops import apply_rotary, rotary_embedding
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 12, [5, 1, 19, 0, 12]
SMALL = {
    "num_heads": 3,
    "head_dim": 4,
    "attention_chunk": 5,
    "conv_layers": 3,
    "conv_size": 3,
    "dilation_factor": 2,
}
pytestmark = pytest.mark.usefixtures("processes")


def build(**settings):
    kind = registry()["tcnca"]
    config: Any = kind.config_class(**{**SMALL, **settings}).resolve(HIDDEN)
    layer: Any = kind(config, LayerContext(HIDDEN, 0.5, 0.5, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # biases, and kappa and mu that make attention choose
        for name, parameter in layer.named_parameters():
            if "bias" in name or name in ("kappa", "mu"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layer


def definition(layer, x, lengths):
    config, outputs = layer.config, []
    for rows in x.split(lengths):
        mixed = rows
        for number, dilation in enumerate(config.dilations):
            taps, bias = getattr(layer, f"conv_{number}"), getattr(layer, f"conv_bias_{number}")
            y = []
            for t in range(len(rows)):
                total = bias
                for j in range(config.conv_size):
                    before = t - (config.conv_size - 1 - j) * dilation
                    if before >= 0:
                        total = total + taps[:, j] * mixed[before]
                y.append(mixed[t] + F.relu(total))
            mixed = torch.stack(y) if y else mixed

        def linear(given, name):
            return given @ getattr(layer, f"{name}_proj").weight.T

        z = F.silu(linear(mixed, "z") + layer.z_bias)[:, None]
        v = F.silu(linear(rows, "v") + layer.v_bias).unflatten(-1, (config.num_heads, -1))
        q, k = (z * layer.kappa[:, i] + layer.mu[:, i] for i in (0, 1))
        at = torch.arange(len(rows)) % config.attention_chunk
        cos, sin = rotary_embedding(at, config.head_dim, 10_000.0)
        q, k = apply_rotary(q[None], cos, sin)[0], apply_rotary(k[None], cos, sin)[0]
        read = []
        for t in range(len(rows)):
            chunk = slice(t - t % config.attention_chunk, t + 1)
            scores = torch.einsum("hd,shd->hs", q[t], k[chunk]) * config.head_dim**-0.5
            read.append(torch.einsum("hs,shd->hd", scores.softmax(-1), v[chunk]).flatten())
        o = torch.stack(read) if read else v.flatten(1)
        gate = F.silu(linear(mixed, "g") + layer.g_bias)
        h = F.silu(linear(mixed, "h") + linear(gate * o, "o") + layer.h_bias)
        phi = torch.sigmoid(linear(mixed, "phi") + layer.phi_bias)
        outputs.append(phi * h + (1 - phi) * rows)
    return torch.cat(outputs)


def test_outputs_and_gradients_are_those_of_the_equations():
    layer = build()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))[0][:, 0]
    expected = definition(layer, x, LENGTHS)
    assert relative_error(found, expected) < 1e-12
    leaves = [x, *layer.parameters()]
    assert largest_error(found, expected, leaves) < 1e-11
    # Cut inside chunks and at their ends, some texts without a token.
    state, starts = None, torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for begin, end in [(0, 3), (3, 4), (4, 5), (5, 12), (12, 30)]:
        parts = [
            range(start + min(begin, n), start + min(end, n))
            for start, n in zip(starts, LENGTHS, strict=False)
        ]
        tokens = [t for part in parts for t in part]
        y, state = layer(
            x[tokens, None], sequences=Sequences.from_lengths(map(len, parts)), state=state
        )
        assert relative_error(y[:, 0], expected[tokens]) < 1e-12


@torch.no_grad()
def test_convolutions_see_as_far_as_their_field():
    """1 + (W - 1)(f^R - 1) / (f - 1) tokens; attention in chunks of one sees its own alone."""
    layer = build(attention_chunk=1)
    x = torch.randn(40, 1, HIDDEN, generator=torch.Generator().manual_seed(4)).double()
    changes = []
    for t in range(40):
        other = x.clone()
        other[t] += 0.5
        changes.append(not torch.equal(layer(other)[0][-1], layer(x)[0][-1]))
    field = 1 + 2 * (2**3 - 1)
    assert changes.index(True) == 40 - field
    config: Any = registry()["tcnca"].config_class()
    assert 1 + (config.conv_size - 1) * sum(config.dilations) == 1361


def test_what_does_not_fit_is_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_heads": 8, "head_dim": 3}, "head_dim is 3, expected an even number"),
        ({"conv_size": 1}, "conv_size is 1, expected at least 2"),
        ({"num_heads": 5}, "hidden_size \\* expand / num_heads is 2.4, expected a whole number"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            mixer("tcnca", hidden_size=HIDDEN, **settings)
