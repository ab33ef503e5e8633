"""pLSTM: chunks against the definition, and both against linear attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.sequences import Sequences
from pretrain.ops import linear_attention, plstm
from tests.helpers.relative_error import relative_error


def inputs(length, heads=2, k_dim=3, v_dim=4, size=2, batch=1, dtype=torch.float64):
    """(q, k, v, source, transition, mark, direct), transitions of norm at most 1."""
    q, k = torch.randn(2, batch, length, heads, k_dim, dtype=dtype)
    v = torch.randn(batch, length, heads, v_dim, dtype=dtype)
    source, turn, mark, direct = torch.randn(4, batch, length, heads, size, size, dtype=dtype)
    turn = turn / torch.linalg.matrix_norm(turn.double(), 2)[..., None, None].to(dtype)
    return [q, k, v, source, turn, mark, direct]


@st.composite
def cases(draw):
    size = draw(st.sampled_from([1, 2, 4]))
    return {
        "lengths": draw(st.lists(st.integers(0, 23), min_size=1, max_size=4)),
        "sizes": {
            "heads": draw(st.integers(1, 3)),
            "k_dim": draw(st.integers(1, 5)),
            "v_dim": size * draw(st.integers(1, 3)),
            "size": size,
        },
        "chunk_size": draw(st.sampled_from([1, 3, 8, 16])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=25)
@given(cases())
def test_chunks_equal_the_definition_with_gradients(case):
    torch.manual_seed(case["seed"])
    tensors = inputs(sum(case["lengths"]), **case["sizes"])
    shape = [case["sizes"][name] for name in ("heads", "k_dim", "v_dim")]
    state = torch.randn(len(case["lengths"]), *shape, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (*tensors, state)]
    results, weights = [], None
    forms = ["recurrent", "chunked", *(["shifted"] if case["sizes"]["size"] == 1 else [])]
    for backend in forms:
        found = plstm(
            *tensors,
            initial_state=state,
            sequences=Sequences.from_lengths(case["lengths"]),
            chunk_size=case["chunk_size"],
            backend=backend,
        )
        weights = weights or [torch.randn_like(x) for x in found]
        total = torch.stack([(x * w).sum() for x, w in zip(found, weights, strict=True)]).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results.append([*found, *gradients])
    for result in results[1:]:
        for expected, other in zip(results[0], result, strict=True):
            assert relative_error(other, expected) < 1e-10


def test_one_part_that_is_kept_is_linear_attention_times_the_mark():
    """T = 1 and D = M S: the state after the token, as linear attention reads it."""
    torch.manual_seed(1)
    q, k, v, source, turn, mark, _ = inputs(37, size=1, batch=2)
    gates = [source, torch.ones_like(turn), mark, mark * source]
    found, state = plstm(q, k, v, *gates, backend="chunked")
    expected, last = linear_attention(q, k * source[..., 0], v)
    assert relative_error(found, mark[..., 0] * expected) < 1e-12
    assert relative_error(state, last) < 1e-12


def test_decays_next_to_zero_are_right():
    torch.manual_seed(2)
    tensors = [x.requires_grad_() for x in inputs(29, size=1)]
    with torch.no_grad():
        tensors[4][:, ::5] *= 1e-40
        tensors[4][:, 3] = 0
    results = []
    for backend in ("recurrent", "shifted"):
        found, state = plstm(*tensors, backend=backend)
        gradients = torch.autograd.grad(found.square().sum() + state.sum(), tensors[:4])
        results.append([found, state, *gradients])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_turns_keep_the_norm_of_the_state():
    torch.manual_seed(3)
    q, k, v, source, turn, mark, direct = inputs(50, v_dim=8, size=4)
    turn = torch.linalg.qr(turn)[0]
    before = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    gates = [0 * source, turn, mark, direct]
    _, after = plstm(q, k, v, *gates, initial_state=before)
    assert relative_error(after.norm(), before.norm()) < 1e-12
    assert relative_error(after, before) > 0.1


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_are_isolated_bit_for_bit(backend):
    torch.manual_seed(4)
    tensors = inputs(40, dtype=torch.float32)
    changed = [torch.cat([x[:, :15] / 2, x[:, 15:]], 1) for x in tensors]
    results = []
    for case in (tensors, changed):
        case = [x.detach().requires_grad_() for x in case]
        output, state = plstm(*case, sequences=Sequences.from_lengths([15, 25]), backend=backend)
        gradients = torch.autograd.grad(output[:, 15:].square().sum(), case)
        assert all(bool((g[:, :15] == 0).all()) for g in gradients)
        results.append([output[:, 15:], state[1], *(g[:, 15:] for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_lower_precisions_are_close():
    torch.manual_seed(5)
    tensors = inputs(200, k_dim=8, v_dim=16, size=4)
    exact, _ = plstm(*tensors)
    found, _ = plstm(*(x.float() for x in tensors))
    assert relative_error(found, exact) < 1e-4
    narrow, state = plstm(*(x.bfloat16() for x in tensors))
    assert (narrow.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(narrow, exact) < 5e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "plstm: backend is 'fast', expected one of"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
        ({"backend": "shifted"}, "backend 'shifted' needs transitions of size 1, found 2"),
        ({"size": 3}, "the transition is 3 x 3, expected a size that divides the 4 channels"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        ({"initial_state": torch.zeros(1, 2, 3, 3)}, r"initial_state is \(1, 2, 3, 3\), expected"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    options = dict(change)
    tensors = inputs(8, size=options.pop("size", 2))
    with pytest.raises(ValueError, match=message):
        plstm(*tensors, **options)
