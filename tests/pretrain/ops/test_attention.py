"""SDPA over packed sequences against softmax written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pretrain.ops import apply_rotary, attention, rotary_embedding, short_convolution
from pretrain.ops.attention import dispatch
from pretrain.ops.attention.dispatch import fast_attention
from tests.helpers.relative_error import relative_error


def written_out(q, k, v, window):
    """One sequence: q [T, H, D], k and v [S, Hkv, D]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
    last = torch.arange(len(k) - len(q), len(k))[:, None]
    keys = torch.arange(len(k))
    hidden = (keys > last) | (keys <= last - (window or len(k) + 1))
    return torch.einsum("hts,shd->thd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels of a GPU")
@pytest.mark.parametrize("lengths", [[1, 200, 63, 64, 130], [130, 130, 130]], ids=str)
@pytest.mark.parametrize("backend", ["flash", "varlen", "sdpa"])
@pytest.mark.parametrize(("past", "window"), [(0, None), (0, 33), (70, None), (70, 33)])
def test_kernels_of_a_gpu(backend, past, window, lengths):
    """In bfloat16, against the definition in float64 on the same numbers."""
    if backend == "flash" and fast_attention(torch.empty(1, 64).bfloat16().cuda()) != "flash":
        pytest.skip("flash-attn is not installed")
    cu_q = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    cu_k = torch.tensor([0, *(n + past for n in lengths)], device="cuda").cumsum(0)
    shapes = [(1, int(cu_q[-1]), 6, 64), *[(1, int(cu_k[-1]), 2, 64)] * 2]
    narrow = [torch.randn(shape, device="cuda").bfloat16() for shape in shapes]
    probe = torch.randn(shapes[0], device="cuda").double()
    results = []
    for kind, dtype in ((backend, torch.bfloat16), ("explicit", torch.float64)):
        inputs = [t.to(dtype).requires_grad_() for t in narrow]
        y = attention(*inputs, window=window, cu_seqlens=cu_q, cu_seqlens_k=cu_k, backend=kind)
        results.append([y, *torch.autograd.grad((y.double() * probe).sum(), inputs)])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-2


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    past=st.integers(0, 9),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    window=st.none() | st.integers(1, 14),
    seed=st.integers(0, 1000),
)
def test_packed_equals_each_sequence_alone(lengths, past, groups, kv_heads, window, seed):
    torch.manual_seed(seed)
    key_lengths = [n + past for n in lengths]
    q = torch.randn(1, sum(lengths), groups * kv_heads, 4, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, sum(key_lengths), kv_heads, 4, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    )
    found = attention(
        q,
        k,
        v,
        window=window,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0),
        cu_seqlens_k=torch.tensor([0, *key_lengths]).cumsum(0),
    )
    parts = zip(q[0].split(lengths), k[0].split(key_lengths), v[0].split(key_lengths), strict=True)
    expected = torch.cat([written_out(*part, window) for part in parts])[None]
    assert relative_error(found, expected) < 1e-12
    probe = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        # absolute where a gradient is nothing but rounding (a sequence of one token)
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-12


@pytest.fixture
def varlen_calls(monkeypatch):
    """Let ``auto`` choose as on a GPU without flash-attn; each call of varlen leaves its lengths.

    What it would compute is computed by its definition.
    """
    calls = []

    def varlen(*arguments):
        calls.append(arguments[3].lengths)
        return dispatch.explicit_attention(*arguments)

    monkeypatch.setattr(dispatch, "fast_attention", lambda q: "varlen")
    monkeypatch.setattr(dispatch, "_varlen", varlen)
    return calls


@given(
    count=st.integers(1, 4),
    length=st.integers(1, 12),
    groups=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    slack=st.none() | st.integers(0, 3),
    seed=st.integers(0, 1000),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_of_one_length_need_no_varlen(
    count, length, groups, kv_heads, slack, seed, varlen_calls
):
    """Also behind a window that hides nothing; keys are not repeated for grouped heads."""
    torch.manual_seed(seed)
    q, k, v = (
        torch.randn(1, count * length, n, 4, dtype=torch.float64, requires_grad=True)
        for n in (groups * kv_heads, kv_heads, kv_heads)
    )
    cu_seqlens = torch.arange(count + 1) * length
    window = None if slack is None else length + slack
    found = attention(q, k, v, window=window, cu_seqlens=cu_seqlens)
    assert varlen_calls == []
    parts = zip(q[0].split(length), k[0].split(length), v[0].split(length), strict=True)
    expected = torch.cat([written_out(*part, None) for part in parts])[None]
    assert relative_error(found, expected) < 1e-12
    probe = torch.randn_like(found)
    for a, b in zip(
        torch.autograd.grad((found * probe).sum(), (q, k, v)),
        torch.autograd.grad((expected * probe).sum(), (q, k, v)),
        strict=True,
    ):
        # absolute where a gradient is nothing but rounding (a sequence of one token)
        assert relative_error(a, b) < 1e-10 or (a - b).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("lengths", "key_lengths", "options"),
    [
        ([5, 6], [5, 6], {}),
        ([5, 5], [7, 7], {}),
        ([5, 5], [5, 9], {}),
        ([5, 5], [5, 5], {"window": 4}),
        ([5, 5], [5, 5], {"backend": "varlen"}),
    ],
)
def test_all_other_sequences_stay_with_varlen(lengths, key_lengths, options, varlen_calls):
    q, k = torch.randn(1, sum(lengths), 4, 8), torch.randn(1, sum(key_lengths), 2, 8)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths, key_lengths))
    found = attention(q, k, k, cu_seqlens=cu_q, cu_seqlens_k=cu_k, **options)
    assert varlen_calls == [lengths]
    window = options.get("window")
    plain = attention(
        q, k, k, cu_seqlens=cu_q, cu_seqlens_k=cu_k, window=window, backend="explicit"
    )
    assert torch.equal(found, plain)


def test_rotary_scores_depend_on_distance_alone():
    q, k = torch.randn(1, 1, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)

    def score(i, j):
        rotated = (
            apply_rotary(x, *rotary_embedding(torch.tensor([p]), 8, 1e4))
            for x, p in ((q, i), (k, j))
        )
        return float((next(rotated) * next(rotated)).sum())

    assert score(5, 3) == pytest.approx(score(105, 103), rel=1e-5)
    assert score(5, 3) != pytest.approx(score(5, 4), rel=1e-3)
    assert score(0, 0) == pytest.approx(float((q * k).sum()))


def test_unavailable_backend_is_an_error():
    x = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="'flash' needs flash-attn"):
        attention(x, x, x, backend="flash")
    with pytest.raises(ValueError, match="backend is 'fast', expected one of"):
        attention(x, x, x, backend="fast")


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [([0, 4, 8], "ends at 8, but there are 10 tokens"), ([3, 10], "must start at 0")],
)
def test_cu_seqlens_that_do_not_fit_are_refused(cu_seqlens, message):
    q = torch.randn(1, 10, 2, 4)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, cu_seqlens=torch.tensor(cu_seqlens))
    with pytest.raises(ValueError, match=message):
        short_convolution(q[:, :, 0], torch.randn(4, 3), cu_seqlens=torch.tensor(cu_seqlens))
