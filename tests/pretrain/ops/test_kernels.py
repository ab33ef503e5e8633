"""Every Triton kernel against its op's definition, gradients included: in the interpreter in
float64, on a GPU, where there is one, in float32."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from pretrain.ops import m2rnn, para_gru, rnn
from pretrain.ops.rnn.cells import CELLS
from pretrain.planner.simulation import Simulation
from pretrain.planner.software import Software
from tests.helpers.kernel_cases import DEVICE, DTYPE, ON_GPU, compare, normal, packed
from tests.helpers.relative_error import relative_error

triton = pytest.importorskip("triton")
from pretrain.ops.m2rnn import kernels as m2rnn_kernels  # noqa: E402
from pretrain.ops.rnn import kernels as rnn_kernels  # noqa: E402


@pytest.mark.parametrize("seed", range(8))
def test_m2rnn(seed):
    """Heads of few value channels, whose W stays on chip, and of many, whose is read again."""
    draw = random.Random(seed)
    lengths, cu_seqlens = packed(draw, 20, 3 if seed < 6 else 1)
    heads, key_dim, value_dim = draw.choice((2, 4)), draw.randint(1, 40), draw.randint(1, 20)
    if seed >= 6:
        value_dim = (70, 130)[seed - 6]
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
    with Simulation("cuda", Software()) as simulation:
        simulation.exclude([q, k, v, weight, forget])
        y, ahead = simulation.measure(
            lambda: m2rnn(q, k, v, weight, forget, cu_seqlens=cu_seqlens, backend="triton")[0]
        )
        like = torch.empty_like(y)
        _, back = simulation.measure(lambda: y.backward(like))
    assert ahead.kept + back.peak < 172e3 * tokens / 8


@pytest.mark.parametrize("cell", list(CELLS))
@pytest.mark.parametrize("seed", range(8))
def test_classical(cell, seed, monkeypatch):
    """Heads of few channels, whose matrices stay on chip, in tiles of sequences (seeds below 3) and
    one by one (from 5 on), and heads of many, whose matrices are read again."""
    monkeypatch.setattr(rnn_kernels, "schedulers", lambda _: 0 if seed < 5 else 10**6)
    draw, kind = random.Random(seed), CELLS[cell]
    lengths, cu_seqlens = packed(draw, 12, 20 if seed in (2, 7) else 4)
    dim = (70, 130)[seed - 3] if 3 <= seed < 5 else draw.choice((3, 16, 20))
    total, heads = sum(lengths), draw.choice((1, 2))
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
                x.new_zeros(1, 2, 1, 1, 300),
                x.new_zeros(1, 300, 1, 300),
                None,
                cell="elman",
                backend="triton",
            ),
            "heads have 300 channels, expected at most 256 for triton in torch.float32",
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
