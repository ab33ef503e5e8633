"""The log-sum-exp gate: chunks against the loop, and as a softmax over the past."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import linear_attention, log_sum_exp_gate
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=4),
    st.sampled_from([1, 3, 8, 128]),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_chunks_equal_the_loop_with_gradients(lengths, chunk_size, scale, known, seed):
    torch.manual_seed(seed)
    x = (scale * torch.randn(1, sum(lengths), 2, 3, dtype=torch.float64)).requires_grad_()
    state = scale * torch.randn(len(lengths), 2, 3, dtype=torch.float64)
    if not known:
        state[0] = -torch.inf
    state.requires_grad_()
    factors = torch.randn(2, *x.shape, dtype=torch.float64)
    last_factors = torch.randn_like(state)
    results = []
    for backend in ("recurrent", "chunked"):
        weight, log_decay, last = log_sum_exp_gate(
            x,
            initial_state=state,
            cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
            backend=backend,
            chunk_size=chunk_size,
        )
        finite = last.masked_fill(last.isinf(), 0)  # -inf where there is still nothing
        loss = (factors[0] * weight + factors[1] * log_decay).sum() + (last_factors * finite).sum()
        gradients = torch.autograd.grad(loss, [x, state], **UNUSED)
        results.append([weight, log_decay, last.exp(), *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_states_are_means_weighted_by_a_softmax():
    lengths = [5, 1, 33]
    x = torch.randn(1, 39, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(1, 39, 2, 4, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    weight, log_decay, last = log_sum_exp_gate(x, cu_seqlens=cu_seqlens)
    q = torch.randn_like(x)
    found, _ = linear_attention(q, weight, v, log_decay=log_decay, scale=1.0, cu_seqlens=cu_seqlens)
    expected = []
    for logits, reads, values in zip(
        x[0].split(lengths), q[0].split(lengths), v[0].split(lengths), strict=True
    ):
        for t in range(len(logits)):
            share = torch.softmax(logits[: t + 1], 0)
            expected.append(torch.einsum("hk,shk,shv->hv", reads[t], share, values[: t + 1]))
    assert relative_error(found[0], torch.stack(expected)) < 1e-13
    ends = torch.stack([part.logsumexp(0) for part in x[0].split(lengths)])
    assert relative_error(last, ends) < 1e-13
    factors = torch.randn_like(found)
    (gradient,) = torch.autograd.grad((factors * found).sum(), x)
    (wanted,) = torch.autograd.grad((factors[0] * torch.stack(expected)).sum(), x)
    assert relative_error(gradient, wanted) < 1e-12


def test_first_tokens_weigh_all_and_decay_nothing():
    weight, log_decay, _ = log_sum_exp_gate(torch.randn(2, 7, 1, 3))
    assert bool((weight[:, 0] == 1).all())
    assert bool((log_decay[:, 0] == 0).all())
    assert bool((log_decay[:, 1:] < 0).all())


def test_long_rows_in_float32_keep_decays_next_to_one():
    x = torch.randn(1, 30_000, 1, 4, generator=torch.Generator().manual_seed(1))
    exact_weight, exact, _ = log_sum_exp_gate(x.double())
    weight, log_decay, _ = log_sum_exp_gate(x)
    assert float(exact[0, -1].abs().max()) < 1e-3
    late = slice(20_000, None)
    assert float((log_decay / exact - 1)[:, late].abs().max()) < 1e-5
    assert float((weight / exact_weight - 1)[:, late].abs().max()) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_any_size_are_finite(dtype):
    x = (1e4 * torch.randn(1, 300, 2, 3)).to(dtype).requires_grad_()
    weight, log_decay, last = log_sum_exp_gate(x, cu_seqlens=torch.tensor([0, 5, 5, 300]))
    assert weight.dtype == dtype
    assert (log_decay.dtype, last.dtype) == (torch.float32, torch.float32)
    (gradient,) = torch.autograd.grad(weight.float().sum() + log_decay.square().sum(), x)
    assert all(bool(tensor.isfinite().all()) for tensor in (weight, log_decay, gradient))
    assert last.isinf().flatten(1).all(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(1, 8, 2)}, r"x is \(1, 8, 2\), expected \[B, T, H, K\]"),
        ({"backend": "fla"}, "backend is 'fla', expected one of"),
        ({"initial_state": torch.zeros(1, 2)}, r"initial_state is \(1, 2\), expected \(1, 2, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"x": torch.zeros(1, 8, 2, 4), **change}
    with pytest.raises(ValueError, match=f"log_sum_exp_gate: {message}"):
        log_sum_exp_gate(arguments.pop("x"), **arguments)
