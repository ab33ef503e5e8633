"""Every Triton kernel against its op's definition, gradients included: in the interpreter in
float64, on a GPU, where there is one, in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pretrain.ops import NewtonReport, m2rnn, para_gru, para_lstm, rnn
from pretrain.ops.rnn.cells import CELLS
from pretrain.planner.hardware import load_hardware
from pretrain.planner.simulation import Simulation
from tests.helpers.relative_error import relative_error

triton = pytest.importorskip("triton")
from pretrain.ops.m2rnn import kernels as m2rnn_kernels  # noqa: E402
from pretrain.ops.para_rnn import kernels as para_rnn_kernels  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.float32) if ON_GPU else ("cpu", torch.float64)
TOLERANCE = 1e-4 if ON_GPU else 1e-10
DEFINITION = {m2rnn: "recurrent", rnn: "recurrent", para_gru: "sequential", para_lstm: "sequential"}


def normal(*shape, scale=1.0):
    return (scale * torch.randn(shape, dtype=DTYPE, device=DEVICE)).requires_grad_()


def packed(draw, longest, count=4):
    """Lengths, among them 0 and 1, and where they begin."""
    lengths = [draw.randint(0, longest) for _ in range(draw.randint(1, count))]
    lengths.insert(draw.randint(0, len(lengths)), draw.choice((0, 1)))
    return lengths, torch.tensor([0, *lengths], device=DEVICE).cumsum(0)


def compare(op, run, wanted, tolerance=TOLERANCE, fast="triton"):
    """run(backend) gives the output and the final states; all of them, and all gradients."""
    results = []
    for backend in (DEFINITION[op], fast):
        output, *states = run(backend)
        generator = torch.Generator(DEVICE).manual_seed(1)
        loss = torch.zeros((), dtype=DTYPE, device=DEVICE)
        for tensor in (output, *states):
            weights = torch.randn(tensor.shape, generator=generator, dtype=DTYPE, device=DEVICE)
            loss = loss + (tensor.masked_fill(tensor.isinf(), 0) * weights).sum()
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append([output, *states, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("seed", range(6))
def test_m2rnn(seed):
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, 30, 3)
    heads, key_dim, value_dim = draw.choice((2, 4)), draw.randint(1, 40), draw.randint(1, 20)
    q = normal(1, sum(lengths), draw.choice((1, 2)), key_dim)
    k = normal(1, sum(lengths), draw.choice((1, heads)), key_dim)
    v, weight = normal(1, sum(lengths), heads, value_dim), normal(heads, value_dim, value_dim)
    weight = (weight.detach() * value_dim**-0.5).requires_grad_()
    forget = torch.rand(1, sum(lengths), heads, dtype=DTYPE, device=DEVICE, requires_grad=True)
    state = normal(len(lengths), heads, key_dim, value_dim)
    clip, every = draw.choice((None, 2**-4)), draw.choice((None, 4, 16))

    def run(backend):
        return m2rnn(
            q,
            k,
            v,
            weight,
            forget,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=backend,
            state_grad_clip=clip,
            checkpoint_every=None if backend == "recurrent" else every,
        )

    compare(m2rnn, run, [q, k, v, weight, forget, state])


def test_m2rnn_gradients_of_many_sequences_are_left_in_few_parts(monkeypatch):
    """Programs share sequences where there are more of them than parts, and go on with theirs in
    the next stretch of time."""
    monkeypatch.setattr(m2rnn_kernels, "DW_SLOTS", 2)
    monkeypatch.setattr(m2rnn_kernels, "SEGMENTS", 2)
    q, k, v, weight = normal(5, 9, 1, 4), normal(5, 9, 1, 4), normal(5, 9, 2, 4), normal(2, 4, 4)
    forget = torch.rand(5, 9, 2, dtype=DTYPE, device=DEVICE, requires_grad=True)

    def run(backend):
        every = None if backend == "recurrent" else 4
        return m2rnn(q, k, v, weight, forget, backend=backend, checkpoint_every=every)

    compare(m2rnn, run, [q, k, v, weight, forget])


def test_m2rnn_keeps_little():
    """What the kernel saves for backward beside its inputs: a state of every 64th token."""
    q, k, v = (torch.randn(1, 256, 1, n, requires_grad=True, device=DEVICE) for n in (16, 16, 16))
    weight = torch.randn(1, 16, 16, requires_grad=True, device=DEVICE)
    forget = torch.rand(1, 256, 1, device=DEVICE)
    saved = 0

    def count(t):
        nonlocal saved
        saved += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        m2rnn(q, k, v, weight, forget, backend="triton")
    inputs = sum(t.numel() * 4 for t in (q, k, v, weight, forget))
    assert saved - inputs < 1.3 * 256 * 16 * 16 * 4 / 64 + 100


def test_m2rnn_backward_takes_an_eighth_of_the_states_of_all_tokens():
    """At the sizes of 410M, of which the published kernel writes 172 KB a token; from allocations
    alone, without a device."""
    heads, k_dim, v_dim, tokens = 84, 64, 16, 8 * 4096
    cu_seqlens = torch.arange(9) * 4096

    def empty(*shape):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)

    q, k, v = empty(1, tokens, 1, k_dim), empty(1, tokens, 1, k_dim), empty(1, tokens, heads, v_dim)
    weight, forget = empty(heads, v_dim, v_dim), empty(1, tokens, heads)
    with Simulation(load_hardware("configs/hardware/h200.yaml")) as simulation:
        simulation.exclude([q, k, v, weight, forget])
        y, ahead = simulation.measure(
            lambda: m2rnn(q, k, v, weight, forget, cu_seqlens=cu_seqlens, backend="triton")[0]
        )
        like = torch.empty_like(y)
        _, back = simulation.measure(lambda: y.backward(like))
    assert ahead.kept + back.peak < 172e3 * tokens / 8


def small_tiles(monkeypatch):
    """Tiles that a test's sequences are longer than."""
    sizes = {"S": 4, "L": 4, "C": 4, "AHEAD": 2, "num_warps": 1, "num_stages": 1}
    monkeypatch.setattr(para_rnn_kernels, "segments", lambda parts, dim: sizes)


def para(op, dim, lengths, cu_seqlens, bound, report, iterations=10):
    u, bias = normal(1, sum(lengths), 3, dim), normal(3, dim, scale=0.5)
    weights = [
        (bound * torch.tanh(normal(n, dim))).detach().requires_grad_()
        for n in ((3,) if op is para_gru else (3, 2))
    ]
    shape = (len(lengths), dim) if op is para_gru else (len(lengths), 2, dim)
    state = (0.9 * torch.tanh(normal(*shape))).detach().requires_grad_()

    def run(backend):
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
        )

    return run, [u, *weights, bias, state]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_newton(op, seed, monkeypatch):
    small_tiles(monkeypatch)
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, 20, 2)
    report = NewtonReport()
    run, wanted = para(op, draw.randint(1, 6), lengths, cu_seqlens, 0.5, report)
    compare(op, run, wanted, fast="triton_shooting")
    assert (report.fallbacks, report.sequences) == (0, len(lengths))
    assert report.residual < (1e-5 if ON_GPU else 1e-11)
    assert 1 <= report.iterations <= 7


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_steps(op, seed, monkeypatch):
    small_tiles(monkeypatch)
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, 20, 2)
    run, wanted = para(op, draw.choice((1, 6, 40)), lengths, cu_seqlens, 4.0, NewtonReport())
    compare(op, run, wanted, 1e-2 if ON_GPU else TOLERANCE, fast="triton_steps")


def test_many_channels_are_stepped_and_few_solved_for(monkeypatch):
    monkeypatch.setattr(para_rnn_kernels, "WIDE", 8)
    small_tiles(monkeypatch)
    for dim, steps in ((4, 0), (2, 1)):
        report = NewtonReport()
        a = (0.5 * torch.tanh(normal(3, dim))).detach()
        para_gru(normal(2, 9, 3, dim), a, backend="triton", report=report)
        assert (report.sequences, min(report.iterations, 1)) == (2, steps)


@pytest.mark.skipif(not ON_GPU, reason="two minutes in the interpreter")
@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_newton_in_the_tiles_that_train(op):
    """Several of them, scanned by several warps, forward and back."""
    cu_seqlens = torch.tensor([0, 150, 163], device=DEVICE)
    run, wanted = para(op, 18, [150, 13], cu_seqlens, 0.5, NewtonReport())
    compare(op, run, wanted, 1e-4 if ON_GPU else 1e-8, fast="triton_shooting")


@pytest.mark.parametrize("op", [para_gru, para_lstm])
def test_what_does_not_converge_is_stepped_and_counted(op, monkeypatch):
    small_tiles(monkeypatch)
    cu_seqlens, report = torch.tensor([0, 11, 12], device=DEVICE), NewtonReport()
    run, wanted = para(op, 3, [11, 1], cu_seqlens, 16.0, report, iterations=2)
    # Chaos: errors grow.
    compare(op, run, wanted, 1e-2 if ON_GPU else 1e-7, fast="triton_shooting")
    assert report.fallbacks >= 1
    assert not report.residual < 1e-2


def test_newton_without_fallback_and_with_few_steps(monkeypatch):
    small_tiles(monkeypatch)
    u, a = normal(1, 16, 3, 4), (0.5 * torch.tanh(normal(3, 4))).detach()
    exact = para_gru(u, a, backend="sequential")[0]
    errors = []
    for steps in (1, 2, 3, 4):
        report = NewtonReport()
        options: dict[str, Any] = {
            "backend": "triton",
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
        cu_seqlens = torch.tensor([0, 6, 12], device=DEVICE)
        output, _ = para_gru(case, a, cu_seqlens=cu_seqlens, backend=backend)
        (gradient,) = torch.autograd.grad(output[:, 6:].square().sum(), case)
        results.append((output[:, 6:], gradient[:, 6:]))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("seed", range(3))
def test_classical(cell, seed):
    draw, kind = random.Random(seed), CELLS[cell]
    lengths, cu_seqlens = packed(draw, 12, 20 if seed == 2 else 4)
    total, dim, heads = sum(lengths), draw.choice((3, 16, 20)), draw.choice((1, 2))
    x, weight = normal(1, total, kind.gates, heads, dim), normal(heads, dim, kind.gates, dim)
    weight = (weight.detach() * dim**-0.5).requires_grad_()
    bias = normal(kind.biases, heads, dim) if seed else None
    states: Any = None
    wanted = [x, weight, *([bias] if seed else [])]
    if seed != 1:
        states = [normal(len(lengths), heads, dim) for _ in kind.states]
        if cell == "slstm":
            states[2].data.abs_().add_(1)  # a normaliser
        wanted += states

    def run(backend):
        output, final = rnn(
            x,
            weight,
            bias,
            cell=cell,
            initial_state=states and tuple(states),
            backend=backend,
            cu_seqlens=cu_seqlens,
            state_grad_clip=draw_clip,
        )
        return output, *final

    draw_clip = draw.choice((None, 2**-4))
    compare(rnn, run, wanted)


def test_bfloat16_inputs():
    """The dtypes of training: outputs and gradients come back in those of the inputs, within what
    bfloat16 rounds away."""
    # The interpreter's arrays have no bfloat16.
    dtype = torch.float16 if triton.knobs.runtime.interpret else torch.bfloat16
    q, k = (normal(1, 20, 1, 16).to(dtype).detach().requires_grad_() for _ in "qk")
    v = normal(1, 20, 2, 16).to(dtype).detach().requires_grad_()
    weight = (normal(2, 16, 16) / 4).to(dtype).detach().requires_grad_()
    forget = torch.rand(1, 20, 2, device=DEVICE, requires_grad=True)
    results = []
    for backend in ("recurrent", "triton"):
        y, state = m2rnn(q, k, v, weight, forget, backend=backend)
        gradients = torch.autograd.grad(
            y.float().square().sum() + state.sum(), [q, k, v, weight, forget]
        )
        assert [g.dtype for g in gradients] == [dtype] * 4 + [torch.float32]
        assert (y.dtype, state.dtype) == (dtype, torch.float32)
        results.append([y, state, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found.float(), expected.float()) < 2e-2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: m2rnn(x, x, x, x[0, :2], x[..., 0], backend="triton", checkpoint_every=6),
            "checkpoint_every is 6, expected a multiple of 4 for triton",
        ),
        (
            lambda x: rnn(
                x.new_zeros(1, 2, 1, 1, 200),
                x.new_zeros(1, 200, 1, 200),
                None,
                cell="elman",
                backend="triton",
            ),
            "heads have 200 channels, expected at most 64 for triton in torch.float32",
        ),
        (
            lambda x: para_gru(
                x.new_zeros(1, 2, 3, 4), x.new_zeros(3, 4), backend="triton", iterations=0
            ),
            "iterations is 0, expected at least 1",
        ),
        (
            lambda x: para_gru(x.new_zeros(1, 2, 3, 4), x.new_zeros(3, 4), x.new_zeros(3, 5)),
            r"bias is \(3, 5\), expected \(3, 4\)",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 2, 2, 2, device=DEVICE))


@pytest.mark.skipif(ON_GPU, reason="there is a GPU")
def test_a_kernel_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    x = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="needs CUDA tensors, found one on 'cpu'"):
        para_gru(x, x[0, 0], backend="triton")


def test_the_benchmarks_stand_in_computes_the_same():
    """What benchmarks/ops_gpu.py sets M2RNN's kernel against."""
    from benchmarks.m2rnn_history import M2RNNWithHistory

    dtype = torch.float32
    q, k, v = (torch.randn(2, 9, h, 16, device=DEVICE, requires_grad=True) for h in (1, 1, 2))
    weight = (torch.randn(2, 16, 16, device=DEVICE) / 4).requires_grad_()
    forget = torch.rand(2, 9, 2, device=DEVICE, dtype=dtype, requires_grad=True)
    wanted, results = [q, k, v, weight, forget], []
    cu_seqlens = torch.tensor([0, 9, 18], device=DEVICE)
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    for y in (
        m2rnn(q, k, v, weight, forget, backend="recurrent")[0],
        M2RNNWithHistory.apply(*packed, weight, forget.flatten(0, 1), cu_seqlens).view_as(v),
    ):
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4
