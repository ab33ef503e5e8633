"""ParaGRU's and ParaLSTM's kernels against their definitions, gradients included: in Triton's
interpreter in float64, on a GPU, where there is one, in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pretrain.data.sequences import Sequences
from pretrain.ops import NewtonReport, para_gru, para_lstm
from tests.helpers.kernel_cases import DEVICE, DTYPE, ON_GPU, TOLERANCE, compare, normal, packed
from tests.helpers.relative_error import relative_error

pytest.importorskip("triton")
from pretrain.ops.para_rnn import kernels, parts


def small_tiles(monkeypatch):
    """Tiles and parts that a test's sequences are longer than."""
    sizes = {"S": 4, "L": 4, "C": 4, "AHEAD": 2, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(kernels, "segments", lambda parts, dim: sizes)
    monkeypatch.setattr(parts, "FEW", 24)


def para(op, dim, lengths, cu_seqlens, bound, report, iterations=10):
    u, bias = normal(1, sum(lengths), 3, dim), normal(3, dim, scale=0.5)
    weights = [
        (bound * torch.tanh(normal(n, dim))).detach().requires_grad_()
        for n in ((3,) if op is para_gru else (3, 2))
    ]
    shape = (len(lengths), dim) if op is para_gru else (len(lengths), 2, dim)
    state = (0.9 * torch.tanh(normal(*shape))).detach().requires_grad_()

    def run(backend, watch=None):
        given = None if backend == "sequential" else report
        return op(
            u,
            *weights,
            bias,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=backend,
            report=given,
            iterations=iterations,
            watch=watch,
        )

    return run, [u, *weights, bias, state]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_shooting(op, seed, monkeypatch):
    """Documents that begin and end anywhere in a segment, several of them or none, and parts that
    end within a tile."""
    small_tiles(monkeypatch)
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, draw.choice((3, 12, 50)), draw.choice((2, 8)))
    report = NewtonReport()
    run, wanted = para(op, draw.randint(1, 6), lengths, cu_seqlens, 0.5, report)
    compare(op, run, wanted, fast="triton_shooting")
    assert (report.fallbacks, report.sequences) == (0, len(lengths) if sum(lengths) else 0)
    assert report.residual < (1e-5 if ON_GPU else 1e-11)
    assert report.iterations <= 7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_steps(op, seed, monkeypatch):
    small_tiles(monkeypatch)
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, 20, 2)
    run, wanted = para(op, draw.choice((1, 6, 40)), lengths, cu_seqlens, 4.0, NewtonReport())
    compare(op, run, wanted, 1e-2 if ON_GPU else TOLERANCE, fast="triton_steps")


@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_gates_shown(op, monkeypatch):
    """Whichever implementation runs; ParaLSTM's gate sees the cell states, which are no output."""
    small_tiles(monkeypatch)
    lengths = [9, 0, 1, 20]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    run, _ = para(op, 5, lengths, cu_seqlens, 0.5, NewtonReport())
    found: dict[str, torch.Tensor] = {}
    for backend in ("sequential", "newton", "triton_shooting", "triton_steps"):
        run(backend, lambda values, name=backend: found.update({name: values["log_decay"]}))
    expected = found.pop("sequential")
    assert len(found) == 3 and bool((expected < 0).all())
    for decay in found.values():
        assert relative_error(decay, expected) < max(TOLERANCE, 1e-9)


@pytest.mark.parametrize(("op", "programs"), [(para_gru, 1), (para_lstm, 264)])
def test_shooting_in_the_tiles_that_train(op, programs, monkeypatch):
    """Two tiles of 512 tokens, or one of 2048 of which some segments have none."""
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    lengths = [523, 13]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    run, wanted = para(op, 9, lengths, cu_seqlens, 0.5, NewtonReport())
    compare(op, run, wanted, 1e-4 if ON_GPU else 1e-10, fast="triton_shooting")


@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_what_does_not_converge_is_stepped_and_counted(op, monkeypatch):
    small_tiles(monkeypatch)
    cu_seqlens, report = torch.tensor([0, 11, 12], device=DEVICE), NewtonReport()
    run, wanted = para(op, 3, [11, 1], cu_seqlens, 16.0, report, iterations=2)
    # Chaos: errors grow.
    compare(op, run, wanted, 1e-2 if ON_GPU else 1e-7, fast="triton_shooting")
    assert report.fallbacks >= 1
    assert not report.residual < 1e-2


def test_shooting_without_fallback_and_with_few_passes(monkeypatch):
    small_tiles(monkeypatch)
    u, a = normal(1, 16, 3, 4), (0.5 * torch.tanh(normal(3, 4))).detach()
    exact = para_gru(u, a, backend="sequential")[0]
    errors = []
    for steps in (1, 2, 3, 4):
        report = NewtonReport()
        options: dict[str, Any] = {
            "backend": "triton_shooting",
            "iterations": steps,
            "tolerance": 0.0,  # every step is made, also in float32
            "fallback": False,
            "report": report,
        }
        errors.append((para_gru(u, a, **options)[0] - exact).abs().max().item())
        assert (report.fallbacks, report.iterations) == (0, steps)
    assert errors[0] > errors[1] > errors[2]
    assert errors[3] < (1e-5 if ON_GPU else 1e-8)


@pytest.mark.parametrize("backend", ["triton_shooting", "triton_steps"])
def test_a_sequence_never_feels_its_neighbour(backend, monkeypatch):
    """Bit for bit, where the neighbour is not a number."""
    small_tiles(monkeypatch)
    a, u = torch.full((3, 4), 0.45, dtype=DTYPE, device=DEVICE), normal(1, 12, 3, 4)
    wild = u.detach().clone()
    wild[:, 2:5] = torch.nan
    results = []
    for case in (u.detach(), wild):
        case = case.clone().requires_grad_()
        cu_seqlens = torch.tensor([0, 6, 12], device=DEVICE)  # both in one tile
        output, _ = para_gru(case, a, cu_seqlens=cu_seqlens, backend=backend)
        (gradient,) = torch.autograd.grad(output[:, 6:].square().sum(), case)
        results.append((output[:, 6:], gradient[:, 6:]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_what_is_handed_on_has_the_bits_of_plain_steps(op, monkeypatch):
    """One pass, and every start of a segment is that of steps: over several tiles, in chaos too."""
    small_tiles(monkeypatch)
    lengths = [37, 5, 22]
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    report = NewtonReport()
    run, _ = para(op, 3, lengths, cu_seqlens, 16.0, report, iterations=1)
    for found, expected in zip(run("triton_shooting"), run("triton_steps"), strict=True):
        assert torch.equal(found, expected)
    assert report.fallbacks >= 2


@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_only_the_sequence_that_does_not_converge_is_handed_on(op, monkeypatch):
    """Its neighbours in the tile keep the bits that they have beside a tame one."""
    sizes = {"S": 16, "L": 4, "C": 4, "AHEAD": 2, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(kernels, "segments", lambda parts, dim: sizes)
    u, state_rows = normal(1, 64, 3, 4).detach(), 1 if op is para_gru else 2
    weights = [torch.full((3, 4), 14.0, dtype=DTYPE, device=DEVICE)]
    if op is para_lstm:
        weights.append(torch.full((2, 4), 14.0, dtype=DTYPE, device=DEVICE))
    shut = -60 if op is para_gru else 60  # nothing moves: the states stay as they are
    u[:, :, 0], u[:, :, 1] = shut, 60.0
    wild = u.clone()
    wild[:, 7:47, :2] = 0.0
    cu_seqlens = torch.tensor([0, 7, 47, 64], device=DEVICE)
    initial = torch.full((3, state_rows, 4), 0.3, dtype=DTYPE, device=DEVICE)
    results = []
    for case, fallbacks in ((u, 0), (wild, 1)):
        report = NewtonReport()
        output, _ = op(
            case,
            *weights,
            initial_state=initial[:, 0] if op is para_gru else initial,
            cu_seqlens=cu_seqlens,
            backend="triton_shooting",
            iterations=2 if op is para_gru else 4,
            report=report,
        )
        assert (report.fallbacks, report.sequences) == (fallbacks, 3)
        results.append(torch.cat([output[:, :7], output[:, 47:]], 1))
    assert torch.equal(*results)


def test_parts_hold_whole_sequences_and_no_more_than_the_longest(monkeypatch):
    monkeypatch.setattr(parts, "FEW", 4)
    found = parts.parts_of(Sequences.from_lengths([2, 0, 3, 9, 1, 1, 8, 0, 1]))
    assert found.starts.tolist() == [0, 5, 14, 16, 25]
    assert (found.count, found.longest) == (4, 9)
    codes = torch.zeros(25, dtype=torch.int32)
    for number, (first, last) in {0: (0, 1), 2: (2, 4), 3: (5, 13), 6: (16, 23)}.items():
        codes[first], codes[last] = 4 * number + 1, 4 * number + 2
    codes[14], codes[15], codes[24] = 4 * 4 + 3, 4 * 5 + 3, 4 * 8 + 3
    assert torch.equal(found.borders, codes)
    none = parts.parts_of(Sequences.from_lengths([0, 0]))
    assert (none.count, none.longest, len(none.borders)) == (0, 0, 0)


@pytest.mark.parametrize("op", ["para_gru", "para_lstm"])
def test_the_longest_sequence_decides_between_steps_and_shooting(op):
    def stepped(lengths, dim=1024):
        return kernels.steps_are_faster(op, Sequences.from_lengths(lengths), dim)

    assert not stepped([4096])
    assert not stepped([65536], 4096)
    assert stepped([1024] * 64)
    # One long document beside many short ones is a chain, however many there are.
    assert not stepped([30000, *[300] * 64])
    assert stepped([300] * 164)
