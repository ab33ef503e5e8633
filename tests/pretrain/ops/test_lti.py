"""Time-invariant systems: chunks and FFT against the loop, and what only such systems do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import dense_lti, lti
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all


def diagonal(channels, modes, dtype=torch.float64):
    """log_a, b, c of stable systems, c's and b's as complex leaves."""
    log_a = torch.complex(
        -2 * torch.rand(channels, modes, dtype=dtype),
        20 * torch.rand(channels, modes, dtype=dtype) - 10,
    )
    b, c = (torch.randn(channels, modes, dtype=log_a.dtype) for _ in range(2))
    return [x.requires_grad_() for x in (log_a, b, c)]


def dense(channels, size, dtype=torch.float64):
    a = torch.randn(channels, size, size, dtype=dtype)
    a = a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b, c = torch.randn(2, channels, size, dtype=dtype)
    return [x.requires_grad_() for x in (a, b.clone(), c.clone())]


def results(op, system, u, state, **options):
    output, final = op(u, *system, initial_state=state, **options)
    generator = torch.Generator().manual_seed(3)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum()
        for x in (output, final)
    )
    found = [output, final, *torch.autograd.grad(loss, [u, *system, state], **UNUSED)]
    return [torch.view_as_real(x) if x.is_complex() else x for x in found]


@given(
    st.lists(st.integers(0, 60), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([1, 3, 8, 16, 64]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_chunks_equal_the_loop_with_gradients(lengths, channels, modes, chunk, is_dense, seed):
    torch.manual_seed(seed)
    op: Any = dense_lti if is_dense else lti
    system = (dense if is_dense else diagonal)(channels, modes)
    u = torch.randn(1, sum(lengths), channels, dtype=torch.float64, requires_grad=True)
    width = modes if is_dense else 2 * modes
    state = torch.randn(len(lengths), channels, width, dtype=torch.float64, requires_grad=True)
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "chunk_size": chunk}
    expected = results(op, system, u, state, backend="recurrent", **options)
    found = results(op, system, u, state, backend="chunked", **options)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-10


@given(
    st.integers(0, 3), st.integers(0, 70), st.integers(1, 3), st.booleans(), st.integers(0, 1000)
)
def test_fft_equals_the_loop_with_gradients(batch, length, modes, is_dense, seed):
    torch.manual_seed(seed)
    op: Any = dense_lti if is_dense else lti
    system = (dense if is_dense else diagonal)(2, modes)
    u = torch.randn(batch, length, 2, dtype=torch.float64, requires_grad=True)
    width = modes if is_dense else 2 * modes
    state = torch.randn(batch, 2, width, dtype=torch.float64, requires_grad=True)
    expected = results(op, system, u, state, backend="recurrent")
    found = results(op, system, u, state, backend="fft")
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-10


def test_a_diagonal_system_is_a_dense_one_of_rotations():
    log_a, b, c = diagonal(2, 3)
    a = log_a.exp()
    rotations = torch.stack(
        [torch.stack([a.real, -a.imag], -1), torch.stack([a.imag, a.real], -1)], -2
    )  # [H, M, 2, 2]
    matrix = torch.stack([torch.block_diag(*blocks) for blocks in rotations])
    columns = torch.view_as_real(b).flatten(-2)
    rows = torch.view_as_real(2 * c.conj().resolve_conj()).flatten(-2)
    u = torch.randn(2, 50, 2, dtype=torch.float64)
    found, state = lti(u, log_a, b, c)
    expected, last = dense_lti(u, matrix, columns, rows)
    assert state is not None
    assert last is not None
    assert relative_error(found, expected) < 1e-12
    assert relative_error(state, last) < 1e-12


def test_the_response_to_an_impulse_is_the_sum_of_powers():
    log_a, b, c = diagonal(3, 4)
    u = torch.zeros(1, 100, 3, dtype=torch.float64)
    u[0, 0] = 1
    y, _ = lti(u, log_a, b, c, chunk_size=16)
    steps = torch.arange(100)[:, None, None]
    expected = 2 * (c * b * log_a.exp() ** steps).real.sum(-1)
    assert relative_error(y[0], expected) < 1e-12


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
def test_low_precision_is_close_over_many_tokens(dtype, bound):
    """Modes as S4D-Lin's: slow to forget, and up to half a turn a token."""
    torch.manual_seed(0)
    step = torch.logspace(-3, -1, 8)[:, None]
    log_a = step * torch.complex(torch.tensor(-0.5), torch.pi * torch.arange(32.0))
    c = torch.randn(8, 32, dtype=torch.complex64)
    u = torch.randn(1, 2000, 8).to(dtype)
    y, state = lti(u, log_a, step.expand_as(c) + 0j, c)
    wide = (x.to(torch.complex128) for x in (log_a, step.expand_as(c) + 0j, c))
    expected, last = lti(u.double(), *wide)
    assert y.dtype == dtype
    assert state is not None
    assert last is not None
    assert state.dtype == torch.float32
    assert relative_error(y, expected) < bound
    assert relative_error(state, last) < 2e-5


def test_a_system_that_forgets_at_once_is_finite():
    log_a = torch.full((1, 1), complex(-torch.inf, 0.0), dtype=torch.complex64)
    one = torch.ones(1, 1, dtype=torch.complex64)
    u = torch.randn(1, 70, 1, requires_grad=True)
    y, _ = lti(u, log_a, one, one)
    y.sum().backward()
    assert relative_error(y, 2 * u) < 1e-6
    assert u.grad is not None
    assert relative_error(u.grad, torch.full_like(u, 2)) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "scan"}, "backend is 'scan', expected one of"),
        ({"u": torch.zeros(8, 2)}, r"u is \(8, 2\), expected \[B, T, channels\]"),
        ({"log_a": torch.zeros(2, 3)}, "log_a is torch.float32, expected complex numbers"),
        ({"b": torch.zeros(2, 4) + 0j}, r"b is \(2, 4\), expected \(2, 3\)"),
        ({"initial_state": torch.zeros(1, 2, 3)}, r"initial_state is \(1, 2, 3\), expected \(1, 2"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
        (
            {"backend": "fft", "cu_seqlens": torch.tensor([0, 5, 8])},
            "backend 'fft' takes rows of one sequence each, found 2 packed",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments: dict[str, Any] = {"u": torch.randn(1, 8, 2)}
    arguments |= {name: torch.randn(2, 3) + 0j for name in ("log_a", "b", "c")}
    with pytest.raises(ValueError, match=f"lti: {message}"):
        lti(**(arguments | change))
    if "log_a" not in change and "b" not in change:
        arguments |= {"a": torch.zeros(2, 3, 3), "b": torch.zeros(2, 3), "c": torch.zeros(2, 3)}
        del arguments["log_a"]
        if "initial_state" not in change:
            with pytest.raises(ValueError, match=f"dense_lti: {message}"):
                dense_lti(**(arguments | change))
