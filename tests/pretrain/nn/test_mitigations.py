"""Mitigations of recurrent states at inference, against plain loops in float64."""

from __future__ import annotations

import itertools
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from pretrain.common.errors import UserError
from pretrain.data.sequences import Sequences
from pretrain.inference.mitigations import limit_by_training, mitigate
from pretrain.library import build_model
from pretrain.nn.mixers import LayerContext, registry
from pretrain.nn.mixers.mitigations import Mitigations, held, recur
from pretrain.nn.parameters import fill_parameters
from pretrain.ops import delta_rule, linear_attention
from pretrain.parallel.context import current_context
from tests.helpers.relative_error import relative_error

HIDDEN, LENGTHS = 24, [7, 1, 19, 5]
CASES = [
    Mitigations(decay_scale=1.7, write_scale=0.4),
    Mitigations(norm_limit=0.8),
    Mitigations(norm_limit=0.8, norm_every=4, decay_scale=1.3),
    Mitigations(window=3),
    Mitigations(window=6, decay_scale=0.5, write_scale=0.7),
]
pytestmark = pytest.mark.usefixtures("processes")


def drawn(decay, steps=1, heads=2, key_dim=4, value_dim=3):
    generator = torch.Generator().manual_seed(1)
    total = sum(LENGTHS)

    def normal(*shape):
        return torch.randn(1, *shape, generator=generator, dtype=torch.float64)

    q, k = normal(total, heads, key_dim), normal(total * steps, heads, key_dim)
    k = k / k.norm(dim=-1, keepdim=True)
    v, beta = normal(total * steps, heads, value_dim), normal(total * steps, heads).sigmoid()
    shapes = {"none": None, "head": (heads,), "channel": (heads, key_dim)}
    shape = shapes[decay]
    log_decay = None if shape is None else -normal(total, *shape).exp() * 0.3
    return q, k, v, beta, log_decay


def loop(wanted, tensors, steps):
    """Every sequence token by token; beta None: no delta rule."""
    q, k, v, beta, log_decay = tensors
    outputs, token = [], 0
    for length in LENGTHS:
        state = q.new_zeros(q.shape[2], q.shape[3], v.shape[3])
        for t in range(token, token + length):
            begin = token if wanted.window is None else max(token, t + 1 - wanted.window)
            if wanted.window is not None:  # what the last tokens alone make of an empty state
                state = torch.zeros_like(state)
            for s in range(begin if wanted.window is not None else t, t + 1):
                if log_decay is not None:
                    decay = (log_decay[0, s] * wanted.decay_scale).exp()
                    state = state * (decay[..., None] if decay.ndim == 2 else decay[:, None, None])
                for j in range(s * steps, (s + 1) * steps):
                    new = v[0, j]
                    if beta is not None:
                        new = beta[0, j][:, None] * (
                            new - torch.einsum("hk,hkv->hv", k[0, j], state)
                        )
                    state = state + wanted.write_scale * torch.einsum("hk,hv->hkv", k[0, j], new)
            if wanted.norm_limit is not None and (t + 1 - token) % wanted.norm_every == 0:
                for head in range(len(state)):
                    norm = float(state[head].norm())
                    state[head] *= min(1.0, wanted.norm_limit / norm)
            outputs.append(torch.einsum("hk,hkv->hv", q[0, t], state) * q.shape[3] ** -0.5)
        token += length
    return torch.stack(outputs)[None]


def by_op(wanted, tensors, steps, lengths, state):
    q, k, v, beta, log_decay = tensors
    op, inputs = (linear_attention, (q, k, v)) if beta is None else (delta_rule, (q, k, v, beta))
    options: dict[str, Any] = {} if steps == 1 else {"num_householder": steps}
    new_state: dict[str, torch.Tensor] = {}
    y = recur(
        cast(Any, SimpleNamespace(mitigations=wanted, note=lambda **_: None)),
        op,
        *inputs,
        state=state,
        new_state=new_state,
        log_decay=log_decay,
        sequences=Sequences.from_lengths(lengths),
        chunk_size=8,
        **options,
    )
    return y, new_state


def of_tokens(tensors, tokens, steps):
    """Some tokens of q, k, v, beta and the log-decay."""
    at = torch.tensor(tokens)
    q, k, v, beta, log_decay = tensors
    many = [
        x if x is None else x.unflatten(1, (-1, steps))[:, at].flatten(1, 2) for x in (k, v, beta)
    ]
    return [q[:, at], *many, None if log_decay is None else log_decay[:, at]]


@pytest.mark.parametrize(
    ("decay", "delta", "steps"),
    [
        ("none", False, 1),
        ("head", False, 1),
        ("channel", False, 1),
        ("head", True, 1),
        ("head", True, 2),
        ("channel", True, 1),
    ],
)
@pytest.mark.parametrize("wanted", CASES)
def test_packed_texts_and_texts_in_pieces_are_the_loop(wanted, decay, delta, steps):
    if delta and wanted.window is not None:
        wanted = Mitigations(norm_limit=0.5, norm_every=3)  # delta rules have no window
    tensors: Any = drawn(decay, steps)
    if not delta:
        tensors = (*tensors[:3], None, tensors[4])
    expected = loop(wanted, tensors, steps)
    y, _ = by_op(wanted, tensors, steps, LENGTHS, None)
    assert relative_error(y, expected) < 1e-13
    # Cut where no piece of a limit ends, then token by token.
    state, starts = None, [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    for begin, end in itertools.pairwise([0, 3, 4, *range(5, max(LENGTHS) + 1)]):
        parts = [
            list(range(start + min(begin, n), start + min(end, n)))
            for start, n in zip(starts, LENGTHS, strict=True)
        ]
        tokens = [t for part in parts for t in part]
        y, state = by_op(
            wanted, of_tokens(tensors, tokens, steps), steps, [len(p) for p in parts], state
        )
        assert relative_error(y, expected[:, tokens]) < 1e-13


def layers_with(setting):
    return [name for name, kind in registry().items() if setting in kind.mitigable]


def build(name, **settings):
    kind = registry()[name]
    config: Any = kind.config_class(**settings).resolve(HIDDEN)
    layer: Any = kind(config, LayerContext(HIDDEN, 0.3, 0.3, current_context(torch.float64)))
    fill_parameters(layer, seed=1)
    return layer


def drawn_input(total=40):
    return torch.randn(total, 2, HIDDEN, generator=torch.Generator().manual_seed(3)).double()


@torch.no_grad()
@pytest.mark.parametrize(
    "name", [*layers_with("window"), "deltanet", "gdn", "kda", "delta_product", "comba", "gdn2"]
)
def test_every_layer_at_its_identities(name):
    layer, x = build(name), drawn_input()
    plain, _ = layer(x)
    layer.mitigations = Mitigations(decay_scale=1.0, write_scale=1.0)
    assert torch.equal(layer(x)[0], plain)
    if "norm_limit" in layer.mitigable:
        layer.mitigations = Mitigations(norm_limit=1e9, norm_every=7)
        assert relative_error(layer(x)[0], plain) < 1e-12
    if "window" in layer.mitigable:
        layer.mitigations = Mitigations(window=len(x))
        assert relative_error(layer(x)[0], plain) < 1e-12
    for setting, wanted in {
        "decay_scale": Mitigations(decay_scale=3.0),
        "norm_limit": Mitigations(norm_limit=1e-3),
        "window": Mitigations(window=2),
    }.items():
        if setting in layer.mitigable:
            layer.mitigations = wanted
            whole, _ = layer(x)
            assert relative_error(whole, plain) > 1e-3, setting
            first, state = layer(x[:13])
            second, _ = layer(x[13:], state=state)
            assert relative_error(torch.cat([first, second]), whole) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("name", ["gla", "mamba2", "linear_attn"])
def test_a_window_holds_what_its_last_tokens_make_of_an_empty_state(name):
    settings = {"conv_size": 0} if name == "mamba2" else {}
    layer, x = build(name, **settings), drawn_input()
    layer.mitigations = Mitigations(window=9)
    _, state = layer(x)
    layer.mitigations = None
    _, alone = layer(x[-9:])
    assert relative_error(held(state)["recurrent"], alone["recurrent"]) < 1e-12
    assert held(alone) is alone


@torch.no_grad()
def test_scales_are_those_of_gates_where_a_layer_has_them():
    x = drawn_input()
    mamba = build("mamba2")
    mamba.mitigations = Mitigations(decay_scale=1.5)
    found, _ = mamba(x)
    mamba.mitigations = None
    mamba.A_log += torch.tensor(1.5).log()
    assert relative_error(found, mamba(x)[0]) < 1e-7
    mlstm = build("mlstm", gate_cap=None)
    mlstm.mitigations = Mitigations(write_scale=0.3)
    found, _ = mlstm(x)
    mlstm.mitigations = None
    mlstm.i_bias += torch.tensor(0.3, dtype=torch.float64).log()
    assert relative_error(found, mlstm(x)[0]) < 1e-12


@torch.no_grad()
def test_a_window_of_mlstm_is_what_its_last_tokens_make_of_an_empty_state():
    layer, x = build("mlstm"), drawn_input(12)
    layer.mitigations = Mitigations(window=4)
    found, _ = layer(x)
    layer.mitigations = None
    alone = torch.cat([layer(x[max(0, t - 3) : t + 1])[0][-1:] for t in range(12)])
    # But for the 1e-6 beside the divisor, which counts in units of the stabilizer.
    assert relative_error(found, alone) < 1e-4


def small(pattern):
    return build_model(
        pattern, vocab_size=32, hidden_size=32, dtype=torch.float64, seed=0, mlp={"kind": "none"}
    ).eval()


def test_settings_that_a_layer_lacks_are_refused_by_its_name():
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("gdn attn", {"window": 4}, "state_window is 4, but 'gdn' (block 0) has no window"),
        ("attn linear_attn", {"decay_scale": 2.0}, "'linear_attn' (block 1) has no log-decay"),
        ("gdn lstm", {"write_scale": 0.5}, "'lstm' (block 1) has no write"),
        ("deltanet", {"decay_scale": 2.0}, "'deltanet' (block 0) has no log-decay"),
        ("mlstm", {"norm_limit": 2.0}, "'mlstm' (block 0) has no matrix state"),
        ("attn swa", {"window": 4}, "no layer of this model has a recurrent state"),
        ("gla", {"window": 0}, "state_window is 0, expected at least 1"),
        ("gla", {"write_scale": -1.0}, "state_write_scale is -1.0, expected a number above 0"),
        ("gla", {"norm_limit": 1.0, "window": 3}, "expected one of the two"),
        ("gla", {"norm_every": 3}, "no limit of the states' norm is set"),
    ]
    for pattern, wanted, words in cases:
        with pytest.raises(UserError, match=re.escape(words)):
            mitigate(small(pattern), Mitigations(**wanted))


@torch.no_grad()
def test_models_and_their_limits_by_training():
    model = small("gdn attn mamba2")
    tokens = torch.randint(32, (2, 24), generator=torch.Generator().manual_seed(5))
    plain = model(tokens)
    mitigate(model, Mitigations())
    assert torch.equal(model(tokens), plain)
    limit_by_training(model, list(tokens), Mitigations(norm_every=2))
    norms = [
        torch.stack(
            [model.states(row[None])[block]["recurrent"][0].norm(dim=(-2, -1)) for row in tokens]
        )
        for block in (0, 2)
    ]
    mitigate(model, None)
    free = [
        torch.stack(
            [model.states(row[None])[block]["recurrent"][0].norm(dim=(-2, -1)) for row in tokens]
        )
        for block in (0, 2)
    ]
    for limited, unlimited in zip(norms, free, strict=True):
        assert bool((limited <= unlimited.mean(0) * (1 + 1e-12)).all())
        assert bool((limited < unlimited).any())
    assert torch.equal(model(tokens), plain)
