"""The chunked delta rule against its definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from pretrain.ops import delta_rule
from tests.helpers.relative_error import relative_error


def inputs(batch, length, heads, k_dim, v_dim, substeps, dtype=torch.float64, beta_max=2.0):
    q = torch.randn(batch, length, heads, k_dim, dtype=dtype)
    k = F.normalize(torch.randn(batch, substeps * length, heads, k_dim, dtype=dtype), dim=-1)
    v = torch.randn(batch, substeps * length, heads, v_dim, dtype=dtype)
    beta = torch.rand(batch, substeps * length, heads, dtype=dtype) * beta_max
    log_decay = -torch.rand(batch, length, heads, dtype=dtype) * 3
    return [x.requires_grad_() for x in (q, k, v, beta, log_decay)]


def run(tensors, backend, **options):
    *main, log_decay = tensors
    return delta_rule(*main, log_decay=log_decay, backend=backend, **options)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
    if sum(lengths) == 0:
        lengths.append(draw(st.integers(1, 90)))
    return {
        "lengths": lengths,
        "heads": draw(st.integers(1, 3)),
        "k_dim": draw(st.integers(1, 9)),
        "v_dim": draw(st.integers(1, 9)),
        "substeps": draw(st.integers(1, 3)),
        "chunk_size": draw(st.sampled_from([3, 8, 16, 64])),
        "gated": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@given(cases())
def test_chunked_equals_recurrent_with_gradients(case):
    torch.manual_seed(case["seed"])
    heads, k_dim, v_dim = case["heads"], case["k_dim"], case["v_dim"]
    total = sum(case["lengths"])
    tensors = inputs(1, total, heads, k_dim, v_dim, case["substeps"])
    state = torch.randn(len(case["lengths"]), heads, k_dim, v_dim, dtype=torch.float64)
    state.requires_grad_()
    cu_seqlens = torch.tensor([0, *case["lengths"]]).cumsum(0)
    if not case["gated"]:
        tensors[-1] = None
    wanted = [t for t in (*tensors, state) if t is not None]
    weights = torch.randn(1, total, heads, v_dim, dtype=torch.float64)
    state_weights = torch.randn_like(state)
    results = []
    for backend in ("recurrent", "chunked"):
        output, final = run(
            tensors,
            backend,
            cu_seqlens=cu_seqlens,
            initial_state=state,
            num_householder=case["substeps"],
            chunk_size=case["chunk_size"],
        )
        total_loss = (output * weights).sum() + (final * state_weights).sum()
        results.append([output, final, *torch.autograd.grad(total_loss, wanted)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("length", [700, 513, 64, 1])
def test_long_rows(length):
    tensors = inputs(2, length, 2, 8, 16, 1)
    expected, state = run(tensors, "recurrent")
    output, final = run(tensors, "chunked")
    assert relative_error(output, expected) < 1e-10
    assert relative_error(final, state) < 1e-10


def test_definition_is_the_householder_recurrence():
    """One head written with matrices: S = a (I - b k^T k) S + b k^T v."""
    q, k, v, beta, log_decay = (t.detach() for t in inputs(1, 5, 1, 4, 3, 1))
    state = torch.zeros(4, 3, dtype=torch.float64)
    expected = []
    for t in range(5):
        key, value, b = k[0, t, 0], v[0, t, 0], beta[0, t, 0]
        keep = torch.eye(4, dtype=torch.float64) - b * torch.outer(key, key)
        state = keep @ (log_decay[0, t, 0].exp() * state) + b * torch.outer(key, value)
        expected.append(q[0, t, 0] @ state / 2)  # scale K^-1/2
    output, final = run([q, k, v, beta, log_decay], "recurrent")
    assert relative_error(output[0, :, 0], torch.stack(expected)) < 1e-14
    assert relative_error(final[0, 0], state) < 1e-14


def test_state_hands_over():
    tensors = inputs(2, 100, 2, 8, 8, 1)
    whole, final = run(tensors, "chunked")
    first, state = run([t[:, :37] for t in tensors], "chunked")
    second, last = run([t[:, 37:] for t in tensors], "chunked", initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(last, final) < 1e-12


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_are_isolated_bit_for_bit(backend):
    tensors = inputs(1, 120, 2, 8, 8, 1, torch.float32)
    cu_seqlens = torch.tensor([0, 50, 120])
    changed = [t.detach().clone() for t in tensors]
    for t in changed:
        t[:, :50] = t[:, :50] * 0.5
    outputs, gradients = [], []
    for case in (tensors, changed):
        case = [t.detach().requires_grad_() for t in case]
        output, state = run(case, backend, cu_seqlens=cu_seqlens)
        outputs.append((output[:, 50:], state[1]))
        loss = (output[:, 50:] ** 2).sum()
        gradients.append([g[:, 50:] for g in torch.autograd.grad(loss, case)])
        spilled = torch.autograd.grad(
            (run(case, backend, cu_seqlens=cu_seqlens)[0][:, 50:]).sum(), case
        )
        assert all(bool((g[:, :50] == 0).all()) for g in spilled)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("log_decay", [-1e3, -1e-8, 0.0])
@pytest.mark.parametrize("beta", [0.0, 1.0, 2.0])
def test_extreme_gates_stay_finite_and_right(log_decay, beta):
    tensors = [t.detach() for t in inputs(1, 4096, 1, 8, 8, 1, torch.float32)]
    tensors[3] = torch.full_like(tensors[3], beta)
    tensors[4] = torch.full_like(tensors[4], log_decay)
    tensors = [t.requires_grad_() for t in tensors]
    output, state = run(tensors, "chunked")
    gradients = torch.autograd.grad(output.square().mean(), tensors)
    assert all(bool(torch.isfinite(t).all()) for t in (output, state, *gradients))
    exact, _ = run([t.double() for t in tensors], "recurrent")
    assert relative_error(output, exact) < 1e-3 or exact.norm() == 0


def test_bf16_is_close_to_float32():
    tensors = [t.detach() for t in inputs(2, 200, 2, 16, 16, 1, torch.float32, beta_max=1.0)]
    narrow = [t.bfloat16() for t in tensors]
    output, state = run(narrow, "chunked")
    expected, _ = run([t.float() for t in narrow], "chunked")
    assert output.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert relative_error(output, expected) < 1e-2


def test_no_tokens():
    tensors = inputs(2, 0, 2, 4, 4, 1)
    state = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    output, final = run(tensors, "auto", initial_state=state)
    assert output.shape == (2, 0, 2, 4)
    assert torch.equal(final, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "chunk"}, "backend is 'chunk', expected one of"),
        ({"num_householder": 2}, r"k is \(1, 8, 2, 4\), expected \(1, 16, 2, 4\)"),
        ({"initial_state": torch.zeros(2, 2, 4, 4)}, r"initial_state is \(2, 2, 4, 4\), expected"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        ({"cu_seqlens": torch.tensor([0, 9, 8])}, "cu_seqlens must start at 0 and never fall"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    tensors = inputs(1, 8, 2, 4, 4, 1)
    options = {"backend": "chunked", **change}
    with pytest.raises(ValueError, match=message):
        run(tensors, **options)


def test_the_scale_is_taken_as_given():
    tensors = inputs(1, 9, 1, 4, 4, 1)
    output, _ = run(tensors, "chunked")
    assert relative_error(run(tensors, "chunked", scale=1.0)[0], 2 * output) < 1e-14  # K^-1/2
    assert bool((run(tensors, "chunked", scale=0.0)[0] == 0).all())
