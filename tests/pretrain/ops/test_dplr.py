"""Diagonal plus low rank: chunks against the definition, and the recurrences that it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.ops import comba, delta_rule, dplr, gdn2, linear_attention
from tests.helpers.relative_error import relative_error


def inputs(length, heads=2, k_dim=6, v_dim=5, decay="channel", batch=1, dtype=torch.float64):
    """Return q, k, v, erase, write and log-decays; what a step erases is at most what is there."""
    q, k, write = torch.randn(3, batch, length, heads, k_dim, dtype=dtype)
    erase = -F.normalize(torch.randn(batch, length, heads, k_dim, dtype=dtype), dim=-1)
    write = F.normalize(write, dim=-1)
    v = torch.randn(batch, length, heads, v_dim, dtype=dtype)
    tensors = [q, k, v, erase, write]
    if decay:
        tensors.append(-3 * torch.rand(q.shape if decay == "channel" else q.shape[:3], dtype=dtype))
    return [x.requires_grad_() for x in tensors]


def run(tensors, backend, **options):
    log_decay = tensors[5] if len(tensors) > 5 else None
    q, k, v, erase = tensors[:4]
    write = options.pop("write", tensors[4])
    return dplr(q, k, v, erase, write, log_decay=log_decay, backend=backend, **options)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 90), min_size=1, max_size=5))
    if sum(lengths) == 0:
        lengths.append(draw(st.integers(1, 90)))
    return {
        "lengths": lengths,
        "sizes": [draw(st.integers(1, most)) for most in (3, 9, 9)],
        "chunk_size": draw(st.sampled_from([1, 3, 8, 16, 64])),
        "decay": draw(st.sampled_from([None, "head", "channel"])),
        "one_key": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=24)
@given(cases())
def test_chunked_equals_recurrent_with_gradients(case):
    torch.manual_seed(case["seed"])
    heads, k_dim, v_dim = case["sizes"]
    tensors = inputs(sum(case["lengths"]), heads, k_dim, v_dim, case["decay"])
    state = torch.randn(len(case["lengths"]), heads, k_dim, v_dim, dtype=torch.float64)
    options = {
        "cu_seqlens": torch.tensor([0, *case["lengths"]]).cumsum(0),
        "initial_state": state.requires_grad_(),
        "chunk_size": case["chunk_size"],
    }
    wanted = [*tensors, state]
    if case["one_key"]:
        options["write"] = None
        del wanted[4]
        tensors[1].data = F.normalize(tensors[1].data, dim=-1)
    weights, state_weights = torch.randn_like(tensors[2]), torch.randn_like(state)
    results = []
    for backend in ("recurrent", "chunked"):
        output, final = run(tensors, backend, **options)
        loss = (output * weights).sum() + (final * state_weights).sum()
        results.append([output, final, *torch.autograd.grad(loss, wanted)])
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


def test_definition_reads_the_state_before_its_decay():
    """One head written with matrices: S = Diag(a) S + p^T (e S) + k^T v."""
    q, k, v, erase, write, log_decay = (x.detach() for x in inputs(5, 1, 4, 3))
    state = torch.zeros(4, 3, dtype=torch.float64)
    expected = []
    for t in range(5):
        keep = torch.diag(log_decay[0, t, 0].exp()) + torch.outer(write[0, t, 0], erase[0, t, 0])
        state = keep @ state + torch.outer(k[0, t, 0], v[0, t, 0])
        expected.append(q[0, t, 0] @ state / 2)  # scale K^-1/2
    output, final = run([q, k, v, erase, write, log_decay], "recurrent")
    assert relative_error(output[0, :, 0], torch.stack(expected)) < 1e-14
    assert relative_error(final[0, 0], state) < 1e-14


def close(found, expected, tensors):
    """Compare outputs, states and the gradients of all tensors."""
    weights = [torch.randn_like(x) for x in expected]
    results = []
    for outputs in (found, expected):
        loss = sum((x * w).sum() for x, w in zip(outputs, weights, strict=True))
        results.append([*outputs, *torch.autograd.grad(loss, tensors, retain_graph=True)])
    for one, other in zip(*results, strict=True):
        assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_without_an_erase_key_it_is_linear_attention(decay):
    torch.manual_seed(0)
    q, k, v, _, write, *decays = inputs(75, decay=decay)
    state = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    found = dplr(
        q, k, v, torch.zeros_like(q), write, log_decay=(*decays, None)[0], initial_state=state
    )
    expected = linear_attention(q, k, v, log_decay=(*decays, None)[0], initial_state=state)
    close(found, expected, [q, k, v, *decays, state])


@pytest.mark.parametrize("decay", [None, "head", "channel"])
def test_with_the_decayed_key_for_both_it_is_the_delta_rule(decay):
    torch.manual_seed(1)
    q, k, v, _, _, *decays = inputs(75, decay=decay)
    beta = torch.rand(q.shape[:3], dtype=q.dtype, requires_grad=True)
    key = F.normalize(k, dim=-1)
    log_decay, erase = None, -key
    if decays:
        log_decay = decays[0]
        erase = -key * (log_decay if decay == "channel" else log_decay[..., None]).exp()
    write = beta[..., None] * key
    found = dplr(q, write, v, erase, write, log_decay=log_decay)
    expected = delta_rule(q, key, v, beta, log_decay=log_decay)
    close(found, expected, [q, k, v, beta, *decays])


def test_gdn2_with_one_gate_per_head_and_comba_with_its_decayed_key_are_the_delta_rule():
    torch.manual_seed(2)
    q, k, v, _, _, per_channel = inputs(75, batch=2)
    beta = torch.rand(q.shape[:3], dtype=q.dtype, requires_grad=True)
    key, per_head = F.normalize(k, dim=-1), per_channel.mean(-1)
    gate = beta[..., None]
    found = gdn2(q, key, v, gate.expand(k.shape), gate.expand(v.shape), log_decay=per_channel)
    expected = delta_rule(q, key, v, beta, log_decay=per_channel)
    close(found, expected, [q, k, v, beta, per_channel])
    found = comba(q, key, v, key * per_head[..., None].exp(), beta, log_decay=per_head)
    expected = delta_rule(q, key, v, beta, log_decay=per_head)
    close(found, expected, [q, k, v, beta, per_channel])


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_gdn2_and_comba_are_their_equations(backend):
    torch.manual_seed(3)
    q, k, v, erase, _, log_decay = (x.detach() for x in inputs(9, 1, 4, 3))
    gates, beta = torch.rand_like(k), torch.rand_like(k[..., 0])
    write_gate, decay = torch.rand_like(v), log_decay[..., 0]
    state, other = torch.zeros(2, 4, 3, dtype=torch.float64)
    outputs: list[list[torch.Tensor]] = [[], []]
    for t in range(9):
        key, value = k[0, t, 0], v[0, t, 0]
        state = log_decay[0, t, 0].exp()[:, None] * state
        state = state + torch.outer(
            key, write_gate[0, t, 0] * value - (gates[0, t, 0] * key) @ state
        )
        outputs[0].append(q[0, t, 0] @ state)
        written = torch.outer(key, beta[0, t, 0] * (value - erase[0, t, 0] @ other))
        other = decay[0, t, 0].exp() * other + written
        outputs[1].append(q[0, t, 0] @ other)
    options = {"scale": 1.0, "backend": backend, "chunk_size": 4}
    found, final = gdn2(q, k, v, gates, write_gate, log_decay=log_decay, **options)
    assert relative_error(found[0, :, 0], torch.stack(outputs[0])) < 1e-13
    assert relative_error(final[0, 0], state) < 1e-13
    found, final = comba(q, k, v, erase, beta, log_decay=decay, **options)
    assert relative_error(found[0, :, 0], torch.stack(outputs[1])) < 1e-13
    assert relative_error(final[0, 0], other) < 1e-13


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_without_a_write_key_it_writes_at_its_key(backend):
    torch.manual_seed(4)
    q, _, v, erase, write, log_decay = inputs(75)
    wanted = [q, write, v, erase, log_decay]
    found, expected = (
        dplr(q, write, v, erase, at, log_decay=log_decay, backend=backend) for at in (None, write)
    )
    close(found, expected, wanted)


def test_state_hands_over():
    tensors = inputs(100, batch=2)
    whole, final = run(tensors, "chunked")
    first, state = run([t[:, :37] for t in tensors], "chunked")
    second, last = run([t[:, 37:] for t in tensors], "chunked", initial_state=state)
    assert relative_error(torch.cat([first, second], 1), whole) < 1e-12
    assert relative_error(last, final) < 1e-12


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_are_isolated_bit_for_bit(backend):
    tensors = inputs(120, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 50, 120])
    changed = [x.detach().clone() for x in tensors]
    for x in changed:
        x[:, :50] *= 0.5
    found = []
    for case in (tensors, changed):
        case = [x.detach().requires_grad_() for x in case]
        output, state = run(case, backend, cu_seqlens=cu_seqlens)
        gradients = torch.autograd.grad(output[:, 50:].square().sum(), case)
        assert all(bool((g[:, :50] == 0).all()) for g in gradients)
        found.append([output[:, 50:], state[1], *(g[:, 50:] for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("log_decay", [-1e3, -0.6, -1e-8, 0.0])
def test_extreme_decays_stay_finite_and_right(log_decay):
    """RWKV-7's erase and write keys: the state stays bounded without any decay."""
    tensors = [x.detach() for x in inputs(1500, 1, 8, 8, dtype=torch.float32)]
    tensors[4] = -torch.rand(tensors[4].shape) * tensors[3]
    tensors[5] = torch.full_like(tensors[5], log_decay)
    tensors = [x.requires_grad_() for x in tensors]
    output, state = run(tensors, "chunked")
    gradients = torch.autograd.grad(output.square().mean(), tensors)
    assert all(bool(x.isfinite().all()) for x in (output, state, *gradients))
    exact, _ = run([x.double() for x in tensors], "recurrent")
    assert relative_error(output, exact) < 1e-3


def test_low_precision_is_close_to_float64():
    tensors = [x.detach() for x in inputs(300, 2, 16, 16)]
    exact, _ = run(tensors, "recurrent")
    wide, _ = run([x.float() for x in tensors], "chunked")
    assert relative_error(wide, exact) < 1e-5
    narrow = [x.bfloat16() for x in tensors]
    output, state = run(narrow, "chunked")
    assert (output.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert relative_error(output, run([x.double() for x in narrow], "recurrent")[0]) < 1e-2


def test_no_tokens():
    tensors = inputs(0, batch=2)
    state = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    output, final = run(tensors, "auto", initial_state=state)
    assert output.shape == (2, 0, 2, 5)
    assert torch.equal(final, state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "chunk"}, "dplr: backend is 'chunk', expected one of"),
        ({"chunk_size": 0}, "dplr: chunk_size is 0, expected at least 1"),
        ({"initial_state": torch.zeros(2, 2, 6, 5)}, r"initial_state is \(2, 2, 6, 5\), expected"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(inputs(8), **{"backend": "chunked", **change})


def test_wrong_shapes_are_named():
    q, k, v, erase, write, log_decay = inputs(8)
    with pytest.raises(ValueError, match=r"dplr: erase is \(1, 7, 2, 6\), expected \(1, 8, 2, 6\)"):
        dplr(q, k, v, erase[:, :7], write)
    with pytest.raises(ValueError, match=r"gdn2: write_gate is \(1, 8, 2, 6\), expected"):
        gdn2(q, k, v, k, k, log_decay=log_decay)
    with pytest.raises(ValueError, match=r"comba: log_decay is \(1, 8, 2, 6\), expected"):
        comba(q, k, v, k, k[..., 0], log_decay=log_decay)
