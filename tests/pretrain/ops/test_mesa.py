"""The mesa layer: conjugate gradients against direct solves, and what it becomes at its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import linear_attention, mesa
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all


def inputs(total, heads=2, key_dim=4, value_dim=3, dtype=torch.float64):
    """q, k, v, beta, ridge, log_decay; q and k of length 1."""
    q, k = F.normalize(torch.randn(2, 1, total, heads, key_dim, dtype=dtype), dim=-1)
    v = torch.randn(1, total, heads, value_dim, dtype=dtype)
    beta, decay = torch.rand(2, 1, total, heads, dtype=dtype)
    ridge = 0.25 + torch.rand(heads, key_dim, dtype=dtype)
    return [x.requires_grad_() for x in (q, k, v, beta, ridge, decay.log().clamp_min(-5))]


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=3),
    st.integers(1, 6),
    st.integers(1, 5),
    st.sampled_from([1, 3, 16, 64]),
    st.integers(0, 1000),
)
def test_iterations_equal_direct_solves_with_gradients(lengths, k_dim, v_dim, chunk_size, seed):
    torch.manual_seed(seed)
    *given_inputs, log_decay = inputs(sum(lengths), 2, k_dim, v_dim)
    root = torch.randn(len(lengths), 2, k_dim, k_dim, dtype=torch.float64)
    states = [root @ root.mT, torch.randn(len(lengths), 2, k_dim, v_dim, dtype=torch.float64)]
    states = [x.requires_grad_() for x in states]
    wanted = [*given_inputs, log_decay, *states]
    factors = [torch.randn_like(x) for x in (given_inputs[2], *states)]
    results = []
    for backend in ("recurrent", "conjugate_gradients"):
        output, ends = mesa(
            *given_inputs,
            log_decay=log_decay,
            initial_state=(states[0], states[1]),
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            backend=backend,
            chunk_size=chunk_size,
        )
        found = [output, *ends]
        terms = [(x * factor).sum() for x, factor in zip(found, factors, strict=True)]
        loss = torch.stack(terms).sum()
        gradients = list(torch.autograd.grad(loss, wanted, **UNUSED))
        # Of Phi only what keeps it symmetric is wanted: it is never anything else.
        gradients[-2] = gradients[-2] + gradients[-2].mT
        results.append([*found, *gradients])
    for expected, one in zip(*results, strict=True):
        assert relative_error(one, expected) < 1e-9


def test_a_large_ridge_is_gated_linear_attention():
    q, k, v, beta, ridge, log_decay = inputs(40)
    large = torch.full_like(ridge, 1e8)
    found, (_, state) = mesa(q, k, v, beta, large, log_decay=log_decay)
    expected, last = linear_attention(q, beta[..., None] * k, v, log_decay=log_decay, scale=1.0)
    assert relative_error(1e8 * found, expected) < 1e-6
    assert relative_error(state, last) < 1e-12


def test_a_small_ridge_recalls_orthonormal_keys_exactly():
    keys = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0][:5].view(1, 5, 1, 8)
    v = torch.randn(1, 5, 1, 3, dtype=torch.float64)
    ones = torch.ones(1, 5, 1, dtype=torch.float64)
    ridge = torch.full((1, 8), 1e-9, dtype=torch.float64)
    found, _ = mesa(keys, keys, v, ones, ridge, log_decay=0 * ones)
    assert relative_error(found, v) < 1e-8


def test_it_is_the_ridge_regression_of_the_past():
    q, k, v, beta, ridge, log_decay = inputs(9, heads=1)
    found, _ = mesa(q, k, v, beta, ridge, log_decay=0 * log_decay)
    keys, values, weights = k[0, :, 0], v[0, :, 0], beta[0]
    normal = keys.T @ (weights * keys) + torch.diag(ridge[0])
    expected = q[0, -1, 0] @ torch.linalg.inv(normal) @ (keys.T @ (weights * values))
    assert relative_error(found[0, -1, 0], expected) < 1e-12


@pytest.mark.parametrize(("iterations", "error"), [(8, 1e-3), (60, 1e-5)])
def test_float32_is_close_and_more_iterations_do_no_harm(iterations, error):
    torch.manual_seed(0)
    wide = inputs(600, key_dim=32, value_dim=8)
    results = []
    for dtype, steps in ((torch.float64, 60), (torch.float32, iterations)):
        given_inputs = [x.detach().to(dtype).requires_grad_() for x in wide]
        *others, log_decay = given_inputs
        output, _ = mesa(*others, log_decay=log_decay, iterations=steps)
        results.append([output, *torch.autograd.grad(output.square().sum(), given_inputs)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < error


def test_bfloat16_is_solved_in_float32():
    *others, log_decay = inputs(50, dtype=torch.float32)
    low = [x.detach().bfloat16() for x in others]
    found, (covariance, _) = mesa(*low, log_decay=log_decay)
    expected, _ = mesa(*(x.float() for x in low), log_decay=log_decay)
    assert (found.dtype, covariance.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(found, expected) < 5e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "chunked"}, "backend is 'chunked', expected one of"),
        ({"ridge": torch.zeros(3, 4)}, r"ridge is \(3, 4\), expected \(2, 4\)"),
        ({"iterations": 0}, "chunk_size is 64 and iterations 0, expected at least 1"),
        (
            {"initial_state": (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))},
            r"initial_state is \(1, 2, 4, 4\), expected \(1, 2, 4, 3\)",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    names = ("q", "k", "v", "beta", "ridge", "log_decay")
    arguments = {**dict(zip(names, inputs(8), strict=True)), **change}
    with pytest.raises(ValueError, match=f"mesa: {message}"):
        mesa(**arguments)
