"""Sliced attention against attention under its slices' mask, and over the passes of a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pretrain.common.config_loader import ConfigError
from pretrain.data.sequences import Sequences
from pretrain.library import build_model, mixer
from pretrain.model.depth_lora import set_depth
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.parameters import fill_parameters
from pretrain.ops import apply_rotary, rotary_embedding
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error
from tests.helpers.small_layers import largest_error

HIDDEN, LENGTHS = 24, [11, 1, 23, 0, 8]
SLICES = {"num_heads": 2, "slice_size": 6, "stride": 4}
pytestmark = pytest.mark.usefixtures("processes")


def build(index=0, **settings):
    kind = registry()["sliced_attn"]
    config: Any = kind.config_class(**{**SLICES, **settings}).resolve(HIDDEN)
    context = LayerContext(HIDDEN, 0.3, 0.3, current_context(torch.float64), index, 4)
    layer: Any = kind(config, context)
    fill_parameters(layer, seed=1)
    return layer


def seen(length, form):
    """Which keys each query of one text sees."""
    at = torch.arange(length)
    shift = 3 if form % 4 == 2 else 0
    part = at % 4 if form % 2 else (at + shift) // 6
    return (part[:, None] == part) & (at[:, None] >= at)


def definition(layer, x, lengths, form):
    """Every sequence alone, all pairs written out."""
    heads, dim = layer.num_heads, layer.head_dim
    outputs = []
    for rows in x.split(lengths):
        q, k, v = (
            (rows @ getattr(layer, f"{n}_proj").weight.T).unflatten(-1, (heads, dim))[None]
            for n in "qkv"
        )
        cos, sin = rotary_embedding(torch.arange(len(rows)), dim, layer.config.rope_theta)
        q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        scores = torch.einsum("thd,shd->hts", q[0], k[0]) * dim**-0.5
        weights = scores.masked_fill(~seen(len(rows), form), -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hts,shd->thd", weights, v[0]).flatten(1))
    return torch.cat(outputs) @ layer.o_proj.weight.T


@pytest.mark.parametrize("form", range(5))
def test_outputs_and_gradients_are_those_of_the_mask(form):
    layer = build(index=form // 2)
    set_depth(layer, form - form // 2)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(sum(LENGTHS), HIDDEN, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    found = layer(x[:, None], sequences=Sequences.from_lengths(LENGTHS))[0][:, 0]
    expected = definition(layer, x, LENGTHS, form)
    assert relative_error(found, expected) < 1e-12
    leaves = [x, *layer.parameters()]
    assert largest_error(found, expected, leaves) < 1e-11
    # Cut in pieces, some of which have no token of some texts.
    state, starts = None, torch.tensor([0, *LENGTHS]).cumsum(0).tolist()
    for begin, end in [(0, 3), (3, 4), (4, 9), (9, 30)]:
        parts = [
            range(start + min(begin, n), start + min(end, n))
            for start, n in zip(starts, LENGTHS, strict=False)
        ]
        tokens = [t for part in parts for t in part]
        y, state = layer(
            x[tokens, None], sequences=Sequences.from_lengths(map(len, parts)), state=state
        )
        assert relative_error(y[:, 0], expected[tokens]) < 1e-12


def test_the_first_form_is_a_setting():
    x = torch.randn(20, 2, HIDDEN, generator=torch.Generator().manual_seed(3)).double()
    assert torch.equal(build(first="strided")(x)[0], build(index=1)(x)[0])
    assert relative_error(build()(x)[0], build(index=1)(x)[0]) > 1e-2


@torch.no_grad()
def test_passes_of_a_loop_connect_what_one_does_not():
    """One block in a loop: the passes alternate, so that the last token sees more each time."""
    model = build_model(
        "sliced_attn",
        vocab_size=32,
        hidden_size=HIDDEN,
        dtype=torch.float64,
        mixers={"sliced_attn": SLICES},
        recursion={"times": 4},
        mlp={"kind": "none"},
    ).eval()
    tokens = torch.randint(32, (1, 41), generator=torch.Generator().manual_seed(4))

    def of_last(times):
        """Which tokens change the last one's logits."""
        assert model.recursion is not None
        model.recursion.set_times(times)
        plain = model(tokens)[0, -1]
        changed = set()
        for t in range(41):
            other = tokens.clone()
            other[0, t] = (other[0, t] + 1) % 32
            if not torch.equal(model(other)[0, -1], plain):
                changed.add(t)
        return changed

    reach = torch.eye(41, dtype=torch.bool)
    for times in range(1, 5):
        reach = (seen(41, times - 1).double() @ reach.double()) > 0
        assert of_last(times) == set(reach[-1].nonzero()[:, 0].tolist())
    assert int(reach[-1].sum()) > 35
    _, states = model.forward_with_state(tokens[:, :30], None)
    after = model.forward_with_state(tokens[:, 30:], states)[0]
    assert relative_error(after, model(tokens)[:, 30:]) < 1e-12


def test_what_does_not_fit_is_refused():
    cases: list[tuple[dict[str, Any], str]] = [
        ({"window": 5}, "window is 5, expected null: slices limit what is seen"),
        ({"stride": 0}, "stride"),
        ({"first": "random"}, "first"),
    ]
    for settings, words in cases:
        with pytest.raises(ConfigError, match=words):
            mixer("sliced_attn", hidden_size=HIDDEN, **settings)
