"""Chunked linear attention against its definition, over all kinds of decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import delta_rule, linear_attention
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 120), min_size=1, max_size=4))
    return {
        "lengths": lengths,
        "heads": draw(st.integers(1, 3)),
        "k_dim": draw(st.integers(1, 9)),
        "v_dim": draw(st.integers(1, 9)),
        "chunk_size": draw(st.sampled_from([1, 3, 8, 16, 64])),
        "decay": draw(st.sampled_from(["none", "head", "channel"])),
        "substeps": draw(st.integers(0, 3)),  # 0: linear attention, else the delta rule
        "seed": draw(st.integers(0, 1000)),
    }


def log_decay_of(kind, shape, strength=3.0, dtype=torch.float64):
    if kind == "none":
        return None
    return -torch.rand(shape if kind == "channel" else shape[:3], dtype=dtype) * strength


@given(cases())
def test_chunked_equals_recurrent_with_gradients(case):
    torch.manual_seed(case["seed"])
    total, heads, n = sum(case["lengths"]), case["heads"], case["substeps"]
    q = torch.randn(1, total, heads, case["k_dim"], dtype=torch.float64)
    k = torch.randn(1, max(n, 1) * total, heads, case["k_dim"], dtype=torch.float64)
    k = torch.nn.functional.normalize(k, dim=-1)
    v = torch.randn(1, max(n, 1) * total, heads, case["v_dim"], dtype=torch.float64)
    beta = 2 * torch.rand(1, max(n, 1) * total, heads, dtype=torch.float64)
    log_decay = log_decay_of(case["decay"], q.shape)
    state = torch.randn(
        len(case["lengths"]), heads, case["k_dim"], case["v_dim"], dtype=torch.float64
    )
    wanted = [q, k, v, state, *([beta] if n else []), *([] if log_decay is None else [log_decay])]
    for tensor in wanted:
        tensor.requires_grad_()
    weights, state_weights = torch.randn_like(v[:, :total]), torch.randn_like(state)
    results = []
    for backend in ("recurrent", "chunked"):
        options = {
            "log_decay": log_decay,
            "initial_state": state,
            "backend": backend,
            "cu_seqlens": torch.tensor([0, *case["lengths"]]).cumsum(0),
            "chunk_size": max(case["chunk_size"], n),
        }
        if n:
            output, final = delta_rule(q, k, v, beta, num_householder=n, **options)
        else:
            output, final = linear_attention(q, k, v, **options)
        loss = (output * weights).sum() + (final * state_weights).sum()
        results.append([output, final, *torch.autograd.grad(loss, wanted, **UNUSED)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_definition_is_the_recurrence_in_matrices():
    q, k, v = torch.randn(3, 1, 5, 1, 4, dtype=torch.float64)
    log_decay = log_decay_of("channel", q.shape)
    state, expected = torch.zeros(4, 4, dtype=torch.float64), []
    for t in range(5):
        state = torch.diag(log_decay[0, t, 0].exp()) @ state + torch.outer(k[0, t, 0], v[0, t, 0])
        expected.append(q[0, t, 0] @ state / 2)  # scale K^-1/2
    output, final = linear_attention(q, k, v, log_decay=log_decay, backend="recurrent")
    assert relative_error(output[0, :, 0], torch.stack(expected)) < 1e-14
    assert relative_error(final[0, 0], state) < 1e-14


@pytest.mark.parametrize("kind", ["head", "channel"])
@pytest.mark.parametrize("value", [-1e3, -30.0, -1e-8, 0.0])
def test_extreme_decays_stay_finite_and_right(kind, value):
    q, k, v = torch.randn(3, 1, 4096, 1, 8)
    k = torch.nn.functional.normalize(k, dim=-1)
    log_decay = torch.full((1, 4096, 1, 8)[: 4 if kind == "channel" else 3], value)
    tensors = [t.requires_grad_() for t in (q, k, v, log_decay)]
    output, state = linear_attention(q, k, v, log_decay=log_decay)
    gradients = torch.autograd.grad(output.square().mean(), tensors)
    assert all(bool(torch.isfinite(t).all()) for t in (output, state, *gradients))
    wide = [t.detach().double() for t in (q, k, v)]
    exact, _ = linear_attention(*wide, log_decay=log_decay.detach().double(), backend="recurrent")
    assert relative_error(output, exact) < 1e-4


def test_strong_and_weak_decays_side_by_side():
    """exp(-G) would overflow in the first channel and exp(G) lose the second."""
    q, k, v = torch.randn(3, 2, 130, 2, 2)
    log_decay = torch.tensor([-200.0, -1e-3]).expand(2, 130, 2, 2)
    output, state = linear_attention(q, k, v, log_decay=log_decay)
    exact, final = linear_attention(
        *(t.double() for t in (q, k, v)), log_decay=log_decay.double(), backend="recurrent"
    )
    assert relative_error(output, exact) < 1e-5
    assert relative_error(state, final) < 1e-5


def test_a_decay_of_minus_infinity_forgets():
    q, k, v = torch.randn(3, 1, 50, 2, 4, dtype=torch.float64)
    log_decay = -torch.rand(1, 50, 2, dtype=torch.float64)
    log_decay[:, 17] = -torch.inf
    found, exact = (
        linear_attention(q, k, v, log_decay=log_decay, backend=b) for b in ("chunked", "recurrent")
    )
    assert relative_error(found[0], exact[0]) < 1e-10
    assert relative_error(found[1], exact[1]) < 1e-10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "chunk"}, "backend is 'chunk', expected one of"),
        ({"log_decay": torch.zeros(1, 8, 3)}, r"log_decay is \(1, 8, 3\), expected \(1, 8, 2\)"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, r"initial_state is \(2, 2, 4, 4\), expected"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    q, k, v = torch.randn(3, 1, 8, 2, 4)
    with pytest.raises(ValueError, match=f"linear_attention: {message}"):
        linear_attention(q, k, v, **change)
