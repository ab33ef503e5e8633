"""Logits and memories that mixers show to who watches a step, against their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.s4 import sampled
from pretrain.nn.mixers.state_space import pairs
from pretrain.ops.attention import dispatch
from pretrain.ops.attention.logits import largest_logit
from pretrain.ops.rnn.cells import CELLS
from tests.helpers.small_layers import small_layer
from tests.helpers.small_mixers import SMALL

WIDTH, LENGTHS = 24, [9, 1, 22]

pytestmark = [pytest.mark.usefixtures("processes")]


def layer_and_input(name, settings):
    torch.manual_seed(3)
    return small_layer(name, WIDTH, **settings), 2 * torch.randn(
        sum(LENGTHS), 1, WIDTH, dtype=torch.float64
    )


def shown(layer, x, sequences=None, state=None):
    """All that a forward pass shows, by name."""
    found: dict[str, list[torch.Tensor]] = {}

    def watch(values):
        for name, value in values.items():
            found.setdefault(name, []).append(value.detach())

    layer.watcher = watch
    layer(x, sequences=sequences, state=state)
    layer.watcher = None
    return found


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@pytest.mark.parametrize("past", [0, 7])
def test_largest_logit_is_that_of_all_pairs(past, window):
    """In tiles of any size; a pair across two documents, the future or a window is no pair."""
    torch.manual_seed(1)
    queries, keys = (
        Sequences.from_lengths(n) for n in ([5, 0, 1, 14], [5 + past, past, 1, 14 + past])
    )
    q, k = torch.randn(20, 4, 3), torch.randn(20 + 3 * past, 2, 3)
    whole = k.repeat_interleave(2, 1)
    logits = torch.einsum("thd,shd->hts", q, whole) * 0.7
    start_q, start_k = 0, 0
    seen = torch.zeros(logits.shape[1:], dtype=torch.bool)
    for n, m in zip(queries.lengths, keys.lengths, strict=True):
        for t in range(n):
            last = start_k + m - n + t
            first = start_k if window is None else max(start_k, last - window + 1)
            seen[start_q + t, first : last + 1] = True
        start_q, start_k = start_q + n, start_k + m
    expected = logits[:, seen].max()
    for tile in (1, 3, 8, 512):
        found = largest_logit(q, k, queries, keys, 0.7, window, tile)
        assert torch.isclose(found, expected, rtol=1e-6)
    # A query that is not finite is left out.
    q[3] = torch.nan
    found = largest_logit(q, k, queries, keys, 0.7, window, 3)
    assert torch.isclose(found, logits[:, seen & q[:, :1, 0].isfinite()].max(), rtol=1e-6)


@pytest.mark.parametrize("number", range(2))
@pytest.mark.parametrize("name", ["attn", "swa", "sliced_attn", "rat", "tcnca"])
def test_largest_logits_are_what_softmax_is_given(name, number, monkeypatch):
    """Of attention written out, whose masked pairs are minus infinity there."""
    settings = SMALL[name][min(number, len(SMALL[name]) - 1)]
    layer, x = layer_and_input(name, settings)
    largest = []
    softmax = torch.Tensor.softmax

    def looking(logits, dim):
        largest.append(logits.amax())
        return softmax(logits, dim)

    with monkeypatch.context() as patched:
        patched.setattr(dispatch, "_sdpa", dispatch.explicit_attention)
        patched.setattr(torch.Tensor, "softmax", looking)
        layer(x, sequences=Sequences.from_lengths(LENGTHS))
        expected = max(largest)
    found = shown(layer, x, Sequences.from_lengths(LENGTHS))["logits"]
    assert torch.isclose(max(t.amax() for t in found), expected, rtol=1e-9)


@pytest.mark.parametrize("name", ["aaren", "lightnet"])
def test_logits_of_a_softmax_over_the_past(name):
    layer, x = layer_and_input(name, SMALL[name][0])
    (found,) = shown(layer, x, Sequences.from_lengths(LENGTHS))["logits"]
    expected = layer.k_proj(x)[:, 0].unflatten(-1, (layer.num_heads, -1))
    if name == "aaren":
        expected = (expected * layer.query).sum(-1) * expected.shape[-1] ** -0.5
    assert torch.isclose(found.max(), expected.max(), rtol=1e-9)


@pytest.mark.parametrize("name", ["lstm", "gru", "slstm", "para_gru", "para_lstm"])
def test_gates_of_cells_are_those_of_single_steps(name):
    """Gates that see the state before a token, packed and from given states, step by step."""
    settings = {"conv_size": 0, "tolerance": 1e-12} if name.startswith("para") else {}
    layer, x = layer_and_input(name, {**SMALL[name][0], **settings})
    starts = layer(0.5 * x, sequences=Sequences.from_lengths(LENGTHS))[1]
    found = shown(layer, x, Sequences.from_lengths(LENGTHS), starts)
    expected = []
    for n, part in enumerate(x.split(LENGTHS)):
        state = {key: value[n : n + 1] for key, value in starts.items()}
        for token in part:
            expected.append(log_keep(layer, name, token, state))
            state = layer(token[None], state=state)[1]
    (decays,) = found["log_decay"]
    assert torch.allclose(decays.flatten(), torch.cat(expected).flatten(), rtol=1e-9)


def log_keep(layer, name, token, state):
    """The logarithm of the gate that keeps a state, by the cells' equations."""
    if not name.startswith("para"):
        row = CELLS[name].forget
        x = layer.x_proj(token).unflatten(-1, (layer.num_heads, CELLS[name].gates, -1))[:, :, row]
        r = torch.einsum("nhd,hde->nhe", state["h"], layer.recurrent[:, :, row])
        return F.logsigmoid(x + r + layer.bias[:, row])
    inner = F.silu(layer.x_proj(token)).unflatten(-1, (layer.num_heads, -1))
    u = torch.einsum("nhd,hde->nhe", inner, layer.gates[..., : layer.head_dim]) + layer.bias[:, 0]
    a = 0.5 * torch.tanh(layer.recurrent / 0.5)
    if name == "para_gru":
        return F.logsigmoid(-(u + a[:, 0] * state["recurrent"][:, 0]))
    cell, h = state["recurrent"].unbind(1)
    return F.logsigmoid(u + a[:, 0] * h + a[:, 3] * cell)


def test_decays_of_state_spaces_are_sizes_of_eigenvalues():
    layer, x = layer_and_input("s4", SMALL["s4"][0])
    (found,) = shown(layer, x)["log_decay"]
    spectrum = torch.complex(layer.decay(), layer.A_imag)
    a, _ = sampled(spectrum, pairs(layer.P), layer.B, layer.dt_log.exp())
    expected = torch.linalg.eigvals(a).abs().log().mean(-1)
    assert torch.allclose(found, expected, rtol=1e-9) and bool((found < 0).all())
    for settings in SMALL["s4d"]:
        layer, x = layer_and_input("s4d", settings)
        (found,) = shown(layer, x)["log_decay"]
        z = torch.complex(layer.decay(), layer.A_imag) * layer.dt_log.exp()[:, None]
        a = (1 + z / 2) / (1 - z / 2) if "discretization" in settings else z.exp()
        assert torch.allclose(found, a.abs().log(), rtol=1e-9)


@pytest.mark.parametrize("settings", SMALL["plstm"])
def test_decays_of_plstm_are_singular_values_of_its_transitions(settings):
    layer, x = layer_and_input("plstm", settings)
    (found,) = shown(layer, x)["log_decay"]
    logits = layer.t_proj(x).transpose(0, 1).unflatten(-1, (layer.num_heads, -1))
    values = torch.linalg.svdvals(layer._transition(logits))
    assert torch.allclose(found.sum(-1), values.log().sum(-1), rtol=1e-6, atol=1e-12)


def test_what_is_computed_again_is_not_shown():
    layer, x = layer_and_input("attn", SMALL["attn"][0])
    found: list[str] = []
    layer.watcher = found.extend
    y = torch.utils.checkpoint.checkpoint(
        lambda x: layer(x)[0], x.requires_grad_(), use_reentrant=False
    )
    assert found == ["logits"]
    y.sum().backward()
    assert found == ["logits"]
