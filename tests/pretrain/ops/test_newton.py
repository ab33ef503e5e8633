"""Newton's method over time against stepping: the two ParaRNN cells, and any cell one writes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import NewtonReport, newton_recurrence, para_gru, para_lstm
from pretrain.ops.newton.block_scan import solve_backward, solve_forward
from tests.helpers.relative_error import relative_error

UNUSED: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}  # of no tokens at all

lengths_of = st.lists(st.integers(0, 300), min_size=1, max_size=5)


def random(*shape, bound=None):
    x = torch.randn(shape, dtype=torch.float64)
    return (x if bound is None else (x * bound).clamp(-bound, bound)).requires_grad_()


def compare(run, wanted):
    results = []
    for backend in ("sequential", "newton"):
        output, state = run(backend)
        generator = torch.Generator().manual_seed(1)
        weights, state_weights = (
            torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in (output, state)
        )
        loss = (output * weights).sum() + (state * state_weights).sum()
        results.append([output, state, *torch.autograd.grad(loss, wanted, **UNUSED)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


@given(lengths_of, st.integers(1, 40), st.sampled_from(["gru", "lstm"]))
def test_newton_equals_stepping(lengths, dim, cell):
    total, count = sum(lengths), len(lengths)
    u, a, c = random(1, total, 3, dim), random(3, dim, bound=0.5), random(2, dim, bound=0.5)
    shape = (count, dim) if cell == "gru" else (count, 2, dim)
    state = random(*shape, bound=0.9)
    report = NewtonReport()
    options = {"cu_seqlens": torch.tensor([0, *lengths]).cumsum(0), "initial_state": state}

    def run(backend):
        if cell == "gru":
            return para_gru(u, a, backend=backend, report=report, **options)
        return para_lstm(u, a, c, backend=backend, report=report, **options)

    compare(run, [u, a, state] if cell == "gru" else [u, a, c, state])
    assert report.fallbacks == 0
    assert report.residual < 1e-11
    assert report.sequences == count


def test_rows_and_long_sequences():
    """Several tiles of time, and rows without cu_seqlens."""
    u, a = random(3, 3000, 3, 40), random(3, 40, bound=0.5)
    compare(lambda backend: para_gru(u, a, backend=backend), [u, a])


# The example of docs/layers.md: a cell of one's own, parallel over time.
def leaky_memory(h, x, parameters):
    """h' = g h + (1 - g) tanh(w h + x_1), g = sigmoid(b + x_0)."""
    weight, bias = parameters
    gate = torch.sigmoid(bias + x[0])
    return gate * h + (1 - gate) * torch.tanh(weight * h + x[1])


def test_a_cell_of_ones_own():
    x, parameters = random(2, 500, 2, 8), random(2, 8, bound=0.9)
    compare(lambda b: newton_recurrence(leaky_memory, x, parameters, backend=b), [x, parameters])
    fast, state = newton_recurrence(leaky_memory, x, parameters)
    h = torch.zeros(1, 2, 8, dtype=torch.float64)
    for t in range(500):
        h = leaky_memory(h, x[:, t].transpose(0, 1), parameters)
    assert relative_error(fast[:, -1, 0], h[0]) < 1e-10
    assert relative_error(state[:, 0], h[0]) < 1e-10


def test_a_cell_of_ones_own_with_coupled_states():
    """A damped rotation of two states per channel, bent by tanh: full 2 x 2 Jacobians."""

    def rotor(h, x, parameters):
        angle = parameters[0] + x[0]
        first = angle.cos() * h[0] - angle.sin() * h[1]
        second = angle.sin() * h[0] + angle.cos() * h[1]
        return 0.9 * torch.tanh(torch.stack([first + x[1], second]))

    x, parameters = random(1, 400, 2, 6, bound=0.5), random(1, 6)
    options: dict[str, Any] = {"num_states": 2, "iterations": 20}
    compare(
        lambda b: newton_recurrence(rotor, x, parameters, backend=b, **options), [x, parameters]
    )


def test_what_does_not_converge_is_stepped_and_counted():
    """Recurrent weights of 8: Newton takes long. Only the sequences concerned are done again."""
    u, a = random(1, 330, 3, 4), torch.full((3, 4), 8.0, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        u[:, 300:, 0] = -40  # the update gate stays shut: nothing to solve in the last sequence
    report = NewtonReport()
    cu_seqlens = torch.tensor([0, 300, 330])

    def run(backend):
        options: dict[str, Any] = {"cu_seqlens": cu_seqlens, "report": report, "iterations": 3}
        return para_gru(u, a, backend=backend, **options)

    compare(run, [u, a])
    assert (report.fallbacks, report.sequences) == (1, 2)
    assert not report.residual < 1e-2


def test_fewer_iterations_leave_a_residual_that_is_reported():
    u, a = random(1, 200, 3, 4), random(3, 4, bound=0.5)
    residuals = []
    for iterations in (1, 2, 3, 4):
        report = NewtonReport()
        para_gru(u, a, iterations=iterations, tolerance=1e-30, report=report)
        assert report.iterations == iterations
        assert report.fallbacks == (1 if report.residual else 0)
        residuals.append(report.residual)
    # Quadratic: each residual is about the square of the one before.
    assert residuals[0] > residuals[1] > residuals[2] > residuals[3]
    assert residuals[3] < 1e-11


def test_without_fallback_the_result_of_the_last_step_stays():
    u, a = random(1, 200, 3, 4), random(3, 4, bound=0.5)
    exact = para_gru(u, a, backend="sequential")[0]
    errors = []
    for iterations in (1, 2, 3):
        report = NewtonReport()
        y = para_gru(u, a, iterations=iterations, fallback=False, report=report)[0]
        assert (report.fallbacks, report.iterations) == (0, iterations)
        errors.append((y - exact).abs().max().item())
    assert errors[0] > 1e-3 > errors[1] > 10 * errors[2] > 0


def test_large_states_are_measured_by_their_size():
    """In float32 a residual of 1e-5 is beyond reach for states of 1000."""
    x, parameters = 100 * torch.randn(2, 300, 1, 4), torch.full((1, 4), 0.9)
    report = NewtonReport()
    found, _ = newton_recurrence(lambda h, x, p: p[0] * h + x, x, parameters, report=report)
    assert report.fallbacks == 0
    exact, _ = newton_recurrence(
        lambda h, x, p: p[0] * h + x, x.double(), parameters.double(), backend="sequential"
    )
    assert relative_error(found, exact) < 1e-5


def test_steps_end_where_the_residual_is_small():
    u, a = random(2, 200, 3, 4), random(3, 4, bound=0.5)
    for tolerance, most in ((10.0, 1), (1e-2, 3), (1e-11, 6)):
        report = NewtonReport()
        para_gru(u, a, tolerance=tolerance, report=report)
        assert report.residual <= tolerance
        assert report.iterations <= most
        assert report.fallbacks == 0


def test_a_sequence_never_feels_its_neighbour():
    """Bit for bit, also where the neighbour diverges to infinity."""
    a = torch.full((3, 4), 0.45)
    u = torch.randn(1, 90, 3, 4)
    wild = u.clone()
    wild[:, :50] *= 1e4
    wild[:, 20] = torch.nan
    results = []
    for case in (u, wild):
        case = case.clone().requires_grad_()
        output, _ = para_gru(case, a, cu_seqlens=torch.tensor([0, 50, 90]))
        (gradient,) = torch.autograd.grad(output[:, 50:].square().sum(), case)
        results.append((output[:, 50:], gradient[:, 50:]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@given(st.integers(1, 3), st.lists(st.integers(0, 20), min_size=1, max_size=4), st.integers(1, 6))
def test_blocked_scan_solves_both_ways(size, lengths, positions):
    """Against one step after another, for blocks of any size and sequences that end early."""
    chunks = sorted((-(-n // positions) for n in lengths), reverse=True)
    counts = [sum(c > j for c in chunks) for j in range(chunks[0])]
    if not counts:
        return
    n, dim = sum(counts), 3
    jacobian = 0.6 * torch.randn(size, size, positions, n, dim, dtype=torch.float64)
    r = torch.randn(size, positions, n, dim, dtype=torch.float64)
    firsts = [sum(counts[:j]) for j in range(len(counts))]
    expected, backward = torch.empty_like(r), torch.empty_like(r)
    carry = torch.zeros(size, counts[0], dim, dtype=torch.float64)
    for first, count in zip(firsts, counts, strict=True):
        carry = carry[:, :count]
        for i in range(positions):
            here = slice(first, first + count)
            carry = torch.einsum("abnd,bnd->and", jacobian[:, :, i, here], carry) + r[:, i, here]
            expected[:, i, here] = carry
    incoming = torch.randn(size, counts[-1], dim, dtype=torch.float64)
    follows = incoming
    for first, count in reversed(list(zip(firsts, counts, strict=True))):
        padded = torch.zeros(size, count, dim, dtype=torch.float64)
        padded[:, : follows.shape[1]] = follows
        follows = padded
        for i in reversed(range(positions)):
            here = slice(first, first + count)
            backward[:, i, here] = r[:, i, here] + follows
            follows = torch.einsum("abnd,and->bnd", jacobian[:, :, i, here], backward[:, i, here])
    found, found_back = r.clone(), r.clone()
    solve_forward(jacobian.clone(), found, counts)
    before = solve_backward(jacobian.clone(), found_back, counts, incoming)
    assert relative_error(found, expected) < 1e-10
    assert relative_error(found_back, backward) < 1e-10
    assert relative_error(before, follows) < 1e-10


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda u, a: para_gru(u, a, backend="fast"), "para_gru: backend is 'fast'"),
        (lambda u, a: para_gru(u, a[:2]), r"para_gru: a is \(2, 4\), expected \(3, 4\)"),
        (lambda u, a: para_gru(u, a, iterations=0), "iterations is 0, expected at least 1"),
        (lambda u, a: para_lstm(u, a, a), r"para_lstm: c is \(3, 4\), expected \(2, 4\)"),
        (
            lambda u, a: para_gru(u, a, cu_seqlens=torch.tensor([0, 3])),
            "cu_seqlens ends at 3, but there are 8 tokens",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 8, 3, 4), torch.zeros(3, 4))
