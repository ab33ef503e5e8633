"""The diagonal recurrence: its fast form against the loop, real and complex."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import diagonal_scan, linear_attention, newton_recurrence
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all


def error(found, expected):
    assert found.dtype == expected.dtype
    if found.is_complex():
        found, expected = torch.view_as_real(found), torch.view_as_real(expected)
    return relative_error(found, expected)


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def decays(*shape, dtype=torch.float64):
    """Decays of either sign, and rotations, a tenth of them 0."""
    a = draw(*shape, dtype=dtype)
    return a / a.abs().clamp_min(1e-9) * torch.rand(shape).double().mul(1.1).sub(0.1).clamp_min(0)


@given(
    st.lists(st.integers(0, 300), min_size=1, max_size=5),
    st.integers(1, 40),
    st.sampled_from([torch.float64, torch.complex128]),
    st.booleans(),
)
def test_tiled_equals_sequential_with_gradients(lengths, dim, dtype, in_logarithms):
    total, ends = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    a, x = decays(1, total, dim, dtype=dtype), draw(1, total, dim, dtype=dtype)
    if in_logarithms:
        a = draw(1, total, dim, dtype=dtype)
        a = -a.abs() if a.is_floating_point() else torch.complex(-a.real.abs(), 3 * a.imag)
    state = draw(len(lengths), dim, dtype=dtype)
    wanted = [t.requires_grad_() for t in (a, x, state)]
    weights, state_weights = draw(1, total, dim, dtype=dtype), draw(len(lengths), dim, dtype=dtype)
    results = []
    for backend in ("sequential", "tiled"):
        given = {"a": None, "log_decay": a} if in_logarithms else {"a": a}
        y, last = diagonal_scan(**given, x=x, initial_state=state, cu_seqlens=ends, backend=backend)
        loss = (y * weights).sum().real + (last * state_weights).sum().real
        results.append([y, last, *torch.autograd.grad(loss, wanted, **UNUSED)])
    for expected, found in zip(*results, strict=True):
        assert error(found, expected) < 1e-12


def test_rows_of_several_tiles_and_states_handed_over():
    a, x = decays(3, 3000, 40), draw(3, 3000, 40)
    wanted = [a.requires_grad_(), x.requires_grad_()]
    whole, last = diagonal_scan(a, x)
    first, state = diagonal_scan(a[:, :1234], x[:, :1234])
    second, end = diagonal_scan(a[:, 1234:], x[:, 1234:], state)
    assert error(torch.cat([first, second], 1), whole) < 1e-12
    assert error(end, last) < 1e-12
    expected, _ = diagonal_scan(a, x, backend="sequential")
    assert error(whole, expected) < 1e-12
    weights = draw(3, 3000, 40)
    found, right = (torch.autograd.grad((y * weights).sum(), wanted) for y in (whole, expected))
    assert max(map(error, found, right)) < 1e-12


def test_it_is_linear_attention_with_a_head_for_each_channel():
    x, log_decay = draw(2, 70, 6), -draw(2, 70, 6).abs()
    found, last = diagonal_scan(None, x, log_decay=log_decay)
    one = torch.ones_like(x)[..., None]
    y, state = linear_attention(
        one, one, x[..., None], log_decay=log_decay, scale=1.0, backend="recurrent"
    )
    assert error(found, y[..., 0]) < 1e-13
    assert error(last, state[..., 0, 0]) < 1e-13


def test_complex_numbers_are_rotations_of_pairs():
    a, x = (decays(2, 90, 5, dtype=torch.complex128), draw(2, 90, 5, dtype=torch.complex128))

    def rotate(h, inputs, _):
        real, imaginary, first, second = inputs
        return torch.stack(
            [
                real * h[0] - imaginary * h[1] + first,
                imaginary * h[0] + real * h[1] + second,
            ]
        )

    inputs = torch.stack([a.real, a.imag, x.real, x.imag], 2)
    pairs, _ = newton_recurrence(
        rotate, inputs, x.new_zeros(0, 5).real, num_states=2, backend="sequential"
    )
    found, _ = diagonal_scan(a, x)
    assert error(found, torch.complex(pairs[:, :, 0], pairs[:, :, 1])) < 1e-13


@pytest.mark.parametrize("log_decay", [-torch.inf, -1e3, -30.0, -1e-8, 0.0])
def test_extreme_decays_stay_finite_and_right(log_decay):
    decay = torch.full((1, 4096, 8), log_decay, requires_grad=True)
    x = torch.randn(1, 4096, 8, requires_grad=True)
    y, state = diagonal_scan(None, x, log_decay=decay)
    gradients = torch.autograd.grad(y.square().mean(), [x, decay])
    assert all(bool(t.isfinite().all()) for t in (y, state, *gradients))
    exact, _ = diagonal_scan(
        None, x.detach().double(), log_decay=decay.detach().double(), backend="sequential"
    )
    assert relative_error(y, exact) < 1e-4  # exp(-1e-8) is 1 in float32


def test_bf16_is_computed_in_float32():
    a, x = torch.rand(2, 100, 5).bfloat16(), torch.randn(2, 100, 5).bfloat16()
    y, state = diagonal_scan(a, x)
    exact, last = diagonal_scan(a.float(), x.float())
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, exact.bfloat16())
    assert torch.equal(state, last)


def test_a_sequence_never_feels_its_neighbour():
    """Bit for bit, also where the neighbour has no numbers."""
    a, x, ends = torch.rand(1, 90, 4), torch.randn(1, 90, 4), torch.tensor([0, 50, 90])
    results = []
    for value in (1.0, torch.nan):
        case, decay = x.clone(), a.clone().requires_grad_()
        case[:, 20] *= value
        case.requires_grad_()
        y, _ = diagonal_scan(decay, case, cu_seqlens=ends)
        found = torch.autograd.grad(y[:, 50:].square().sum(), [decay, case])
        results.append([t[:, 50:] for t in (y, *found)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


A = torch.zeros(1, 8, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: diagonal_scan(A, A[0]), r"x is \(8, 4\), expected \[B, T, D\]"),
        (lambda: diagonal_scan(A[:, :7], A), r"a is \(1, 7, 4\), expected \(1, 8, 4\)"),
        (lambda: diagonal_scan(None, A), "a and log_decay are both None, expected one of them"),
        (lambda: diagonal_scan(A, A, log_decay=A), "a and log_decay are both given"),
        (lambda: diagonal_scan(A + 0j, A), "a is torch.complex64 and x torch.float32, expected"),
        (lambda: diagonal_scan(A, A, A[0]), r"initial_state is \(8, 4\), expected \(1, 4\)"),
        (lambda: diagonal_scan(A, A, backend="chunked"), "backend is 'chunked', expected one of"),
        (lambda: diagonal_scan(A, A, None, torch.tensor([0, 5])), "cu_seqlens ends at 5, but"),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"diagonal_scan: {message}"):
        call()
