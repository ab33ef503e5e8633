"""m2rnn and the classical cells: backward by hand against autograd, and against torch.nn."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import m2rnn, rnn
from pretrain.ops.rnn.cells import CELLS
from tests.helpers.relative_error import relative_error

lengths_of = st.lists(st.integers(0, 90), min_size=1, max_size=4)
clips = st.sampled_from([None, 0.05])
blocks = st.sampled_from([None, 1, 7])


def random(*shape, scale=1.0):
    return (scale * torch.randn(shape, dtype=torch.float64)).requires_grad_()


def compare(run, wanted, fast=("checkpointed",)):
    """run(backend) gives output and final states; all forms, all gradients."""
    results = []
    for backend in ("recurrent", *fast):
        output, states = run(backend)
        generator = torch.Generator().manual_seed(1)
        loss = torch.zeros((), dtype=torch.float64)
        for tensor in (output, *states):
            weights = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            loss = loss + (tensor.masked_fill(tensor.isinf(), 0) * weights).sum()
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        results.append([output, *states, *gradients])
    for result in results[1:]:
        for expected, found in zip(results[0], result, strict=True):
            assert relative_error(found, expected) < 1e-10


@given(lengths_of, st.sampled_from([1, 3, 4, 6]), st.sampled_from([1, 2, 4]), clips, blocks)
def test_m2rnn_backward(lengths, value_dim, shared, clip, block):
    total = sum(lengths)
    q, k = random(1, total, shared, 5), random(1, total, 1, 5)
    v, weight = random(1, total, 4, value_dim), random(4, value_dim, value_dim, scale=0.5)
    forget = torch.rand(1, total, 4, dtype=torch.float64, requires_grad=True)
    state = random(len(lengths), 4, 5, value_dim)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def run(backend):
        output, final = m2rnn(
            q,
            k,
            v,
            weight,
            forget,
            initial_state=state,
            cu_seqlens=cu_seqlens,
            backend=backend,
            state_grad_clip=clip,
            checkpoint_every=block,
        )
        return output, (final,)

    compare(run, [q, k, v, weight, forget, state], ("checkpointed", "compiled"))


def test_compiled_m2rnn_is_the_same_by_any_number_of_threads():
    """Sums that several threads add to are cut by heads and sequences, whoever runs them."""
    q, k, v = (torch.randn(1, 120, heads, 8) for heads in (2, 1, 4))
    inputs = [t.requires_grad_() for t in (q, k, v, torch.randn(4, 8, 8), torch.rand(1, 120, 4))]
    results, threads = [], torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            y, state = m2rnn(*inputs, cu_seqlens=torch.tensor([0, 50, 120]), backend="compiled")
            results.append([y, state, *torch.autograd.grad(y.square().sum(), inputs)])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *results))


def test_compiled_tanh():
    """Within five roundings of float32 everywhere, never above 1; NaN and infinities go through."""
    size = torch.cat([torch.logspace(-30, 1, 4000), torch.linspace(0, 10, 4001)])
    values = torch.cat([size, -size, torch.tensor([torch.inf, -torch.inf])])
    # By a weight of zeros and a forget gate of 0, the state is tanh(k v).
    v, k = values.view(1, -1, 1, 1), torch.ones(1, len(values), 1, 1)
    q, weight, forget = torch.ones_like(v), torch.zeros(1, 1, 1), torch.zeros(1, len(values), 1)
    found, _ = m2rnn(q, k, v, weight, forget, backend="compiled")
    expected = values.double().tanh()
    unit = torch.exp2(expected.abs().clamp(min=1e-38).log2().floor() - 23)
    assert ((found.flatten() - expected).abs() / unit).max() < 5
    assert found.abs().max() <= 1
    nan, _ = m2rnn(q[:, :1], k[:, :1] * torch.nan, v[:, :1], weight, forget[:, :1])
    assert nan.isnan().all()


def test_auto_is_compiled_on_a_cpu():
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    weight, forget = torch.randn(1, 8, 8), torch.rand(1, 20, 1)
    found = {b: m2rnn(q, k, v, weight, forget, backend=b)[0] for b in ("auto", "compiled")}
    assert torch.equal(found["auto"], found["compiled"])


@pytest.mark.parametrize("backend", ["checkpointed", "compiled"])
@pytest.mark.parametrize("size", [0.03, 1.0])
def test_m2rnn_in_float32(size, backend):
    """tanh by the sigmoid costs small states few of their digits."""
    q, k, v = (size * torch.randn(1, 64, heads, 8) for heads in (1, 1, 4))
    weight, forget = torch.eye(8).expand(4, 8, 8), torch.rand(1, 64, 4)
    inputs = [t.requires_grad_() for t in (q, k, v, weight.clone(), forget)]
    results = []
    for form, dtype in (("recurrent", torch.float64), (backend, torch.float32)):
        y, state = m2rnn(*(t.to(dtype) for t in inputs), backend=form)
        found = y, state, *torch.autograd.grad(y.sum() + state.sum(), inputs)
        results.append([t.double() for t in found])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < (1e-4 if size < 1 else 1e-5)


@given(st.sampled_from(list(CELLS)), lengths_of, clips, blocks, st.booleans())
def test_classical_backward(cell, lengths, clip, block, biased):
    kind, total = CELLS[cell], sum(lengths)
    x = random(1, total, kind.gates, 2, 3)
    weight = random(2, 3, kind.gates, 3, scale=0.5)
    bias = random(kind.biases, 2, 3) if biased else None
    states = [random(len(lengths), 2, 3) for _ in kind.states]
    if cell == "slstm":
        states[2].data.abs_().add_(1)  # a normaliser
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)

    def run(backend):
        return rnn(
            x,
            weight,
            bias,
            cell=cell,
            initial_state=tuple(states),
            cu_seqlens=cu_seqlens,
            backend=backend,
            state_grad_clip=clip,
            checkpoint_every=block,
        )

    compare(run, [x, weight, *states, *([bias] if biased else [])])


def test_m2rnn_definition():
    """One head written with matrices."""
    q, k, v = (random(1, 6, 1, n) for n in (4, 4, 3))
    weight, forget = random(1, 3, 3), torch.rand(1, 6, 1, dtype=torch.float64)
    state, expected = torch.zeros(4, 3, dtype=torch.float64), []
    for t in range(6):
        z = torch.tanh(state @ weight[0] + torch.outer(k[0, t, 0], v[0, t, 0]))
        state = forget[0, t, 0] * state + (1 - forget[0, t, 0]) * z
        expected.append(q[0, t, 0] @ state)
    for backend in ("recurrent", "checkpointed", "compiled"):
        output, final = m2rnn(q, k, v, weight, forget, backend=backend)
        assert relative_error(output[0, :, 0], torch.stack(expected)) < 1e-14
        assert relative_error(final[0, 0], state) < 1e-14


def test_clip_bounds_what_is_carried_and_not_what_is_read():
    """A clip next to zero leaves the gradient of each step's own read alone."""
    q, k, v = (random(1, 5, 1, n) for n in (4, 4, 3))
    weight, forget = random(1, 3, 3), torch.full((1, 5, 1), 0.5, dtype=torch.float64)
    output, _ = m2rnn(q, k, v, weight, forget, state_grad_clip=1e-30)
    (found,) = torch.autograd.grad(output.sum(), v)
    states = [torch.zeros(4, 3, dtype=torch.float64)]
    for t in range(5):
        write = torch.outer(k[0, t, 0], v[0, t, 0])
        states.append(0.5 * states[-1] + 0.5 * torch.tanh(states[-1] @ weight[0] + write))
    for t in range(5):
        value = v[0, t, 0].detach().requires_grad_()
        write = torch.outer(k[0, t, 0], value)
        after = 0.5 * torch.tanh(states[t].detach() @ weight[0] + write)
        (alone,) = torch.autograd.grad((q[0, t, 0] @ after).sum(), value)
        assert relative_error(found[0, t, 0], alone) < 1e-12


@pytest.mark.parametrize("cell", ["lstm", "gru", "elman"])
def test_cells_are_those_of_torch(cell):
    dim = 5
    make = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "elman": torch.nn.RNN}[cell]
    theirs = make(7, dim, batch_first=True).double()
    x = torch.randn(2, 9, 7, dtype=torch.float64)
    expected, _ = theirs(x)
    kind = CELLS[cell]
    # torch has no head axis; its GRU gives the reset gate's product a bias of its own.
    gates = (x @ theirs.weight_ih_l0.t()).unflatten(-1, (kind.gates, 1, dim))
    weight = theirs.weight_hh_l0.view(kind.gates, dim, dim).permute(2, 0, 1)[None]
    inner, recurrent = (b.view(kind.gates, 1, dim) for b in (theirs.bias_ih_l0, theirs.bias_hh_l0))
    bias = inner + recurrent
    if cell == "gru":
        bias = torch.cat([bias[:2], inner[2:], recurrent[2:]])
    found, _ = rnn(gates, weight, bias, cell=cell)
    assert relative_error(found[:, :, 0], expected) < 1e-12


def test_slstm_is_what_its_stabiliser_hides():
    """c / n with plain exponentials, where they do not overflow."""
    x, weight = random(1, 8, 4, 1, 3), random(1, 3, 4, 3, scale=0.5)
    c = n = h = torch.zeros(3, dtype=torch.float64)
    expected = []
    for t in range(8):
        i, f, z, o = x[0, t, :, 0] + torch.einsum("d,dge->ge", h, weight[0])
        c = torch.sigmoid(f) * c + i.exp() * torch.tanh(z)
        n = torch.sigmoid(f) * n + i.exp()
        h = torch.sigmoid(o) * c / n
        expected.append(h)
    found, _ = rnn(x, weight, None, cell="slstm")
    assert relative_error(found[0, :, 0], torch.stack(expected)) < 1e-12


def test_memory_of_m2rnn_is_a_fraction_of_its_states():
    """Bytes saved for backward at T = 2048, against every state."""
    q, k, v = (torch.randn(1, 2048, 2, n, requires_grad=True) for n in (16, 16, 8))
    weight, forget = torch.randn(2, 8, 8, requires_grad=True), torch.rand(1, 2048, 2)
    saved = 0

    def count(t):
        nonlocal saved
        saved += t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        m2rnn(q, k, v, weight, forget)
    every_state = 2048 * 2 * 16 * 8 * 4
    inputs = sum(t.numel() * 4 for t in (q, k, v, weight, forget))
    assert saved - inputs < every_state / 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: rnn(x, w, None, cell="qrnn"), "cell is 'qrnn', expected one of"),
        (lambda x, w: rnn(x, w, None, cell="gru"), r"x is \(1, 8, 4, 2, 3\), expected"),
        (lambda x, w: rnn(x, w, None, backend="fast"), "backend is 'fast', expected one of"),
        (lambda x, w: rnn(x, w, None, state_grad_clip=0), "state_grad_clip is 0, expected more"),
        (lambda x, w: rnn(x, w[:1], None), "recurrent_weight is"),
        (lambda x, w: rnn(x, w, None, checkpoint_every=0), "checkpoint_every is 0, expected at"),
        (lambda x, w: rnn(x, w, None, initial_state=(x[:, 0, 0],)), "has 1 tensors, expected"),
        (
            lambda x, w: m2rnn(x[:, :, 0], x[:, :, 0], x[:, :, 0], w[0], x[:, :, 0, :, 0]),
            "m2rnn: weight is",
        ),
    ],
)
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(1, 8, 4, 2, 3), torch.zeros(2, 3, 4, 3))
