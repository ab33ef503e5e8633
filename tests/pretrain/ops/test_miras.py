"""Memories trained online: chunks against the definition, and both against what they reduce to."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.data.sequences import Sequences
from pretrain.ops import delta_rule, miras
from pretrain.ops.miras import MirasRule, MirasState
from tests.helpers.relative_error import relative_error

RULES = [
    MirasRule("l2"),
    MirasRule("lp", 3.0, "norm", 4.0),
    MirasRule("lp", 1.0, "mirror", 3.0),
    MirasRule("huber"),
    MirasRule("l2", retention="softmax"),
]


def inputs(total, rule, layers, heads=2, k_dim=3, v_dim=4, per_head=False, dtype=torch.float64):
    """(q, k, v, log_decay, rate), memory, and the threshold where the rule has one."""
    v_dim = k_dim if layers == 2 else v_dim
    q, k = torch.randn(2, 1, total, heads, k_dim, dtype=dtype)
    v = torch.randn(1, total, heads, v_dim, dtype=dtype)
    shape = (1, total, heads) if per_head else q.shape
    gates = -torch.rand(shape, dtype=dtype) / 5, torch.rand(shape, dtype=dtype) / 10
    shapes = [(k_dim, v_dim)] if layers == 1 else [(k_dim, 5), (5, k_dim)]
    memory = [torch.randn(heads, *shape, dtype=dtype) for shape in shapes]
    threshold = torch.rand(v.shape, dtype=dtype) + 0.1 if rule.loss == "huber" else None
    return [q, F.normalize(k, dim=-1), v, *gates], memory, threshold


def run(tokens, memory, threshold, rule, **options):
    q, k, v, log_decay, rate = tokens
    return miras(q, k, v, log_decay, rate, memory, rule=rule, threshold=threshold, **options)


@st.composite
def cases(draw):
    lengths = draw(st.lists(st.integers(0, 13), min_size=1, max_size=3))
    return {
        "lengths": lengths,
        "seen": [draw(st.integers(0, 9)) for _ in lengths],
        "rule": draw(st.sampled_from(RULES)),
        "layers": draw(st.integers(1, 2)),
        "per_head": draw(st.booleans()),
        "chunk_size": draw(st.sampled_from([1, 3, 8])),
        "seed": draw(st.integers(0, 1000)),
    }


@settings(max_examples=15)
@given(cases())
def test_chunks_equal_the_definition_with_gradients(case):
    """From states in the middle of a chunk, too."""
    torch.manual_seed(case["seed"])
    rule, chunk_size, count = case["rule"], case["chunk_size"], len(case["lengths"])
    tokens, memory, threshold = inputs(
        sum(case["lengths"]), rule, case["layers"], per_head=case["per_head"]
    )
    start, now = ([torch.randn(count, *m.shape).double() / 10 for m in memory] for _ in "ab")
    leaves = [*tokens, *memory, *start, *now, *([] if threshold is None else [threshold])]
    for leaf in leaves:
        leaf.requires_grad_()
    seen = torch.tensor(case["seen"])
    between = (seen % chunk_size == 0)[:, None, None, None]  # chunks: start is now there
    results, weights = [], None
    for backend in ("recurrent", "chunked"):
        first = tuple(torch.where(between, b, a) for a, b in zip(start, now, strict=True))
        output, state = run(
            tokens,
            memory,
            threshold,
            rule,
            chunk_size=chunk_size,
            initial_state=MirasState(first, tuple(now), seen),
            sequences=Sequences.from_lengths(case["lengths"]),
            backend=backend,
        )
        found = [output, *state.start, *state.now]
        weights = weights or [torch.randn_like(x) for x in found]
        total = sum((x * w).sum() for x, w in zip(found, weights, strict=True))
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        results.append([*found, *gradients])
        assert state.seen.tolist() == [
            a + b for a, b in zip(case["seen"], case["lengths"], strict=True)
        ]
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.loss}-{rule.retention}")
@pytest.mark.parametrize("layers", [1, 2])
def test_a_state_handed_over_at_any_token_goes_on_exactly(rule, layers):
    torch.manual_seed(1)
    tokens, memory, threshold = inputs(11, rule, layers)
    whole, final = run(tokens, memory, threshold, rule, chunk_size=4)
    for borders in ([0, 3, 4, 9, 11], range(12)):
        state, outputs = None, []
        for a, b in itertools.pairwise(borders):
            part = [x[:, a:b] for x in tokens]
            limit = None if threshold is None else threshold[:, a:b]
            y, state = run(part, memory, limit, rule, chunk_size=4, initial_state=state)
            outputs.append(y)
        assert relative_error(torch.cat(outputs, 1), whole) < 1e-12
        for name in ("start", "now"):
            for one, other in zip(getattr(state, name), getattr(final, name), strict=True):
                assert relative_error(one, other) < 1e-12


@pytest.mark.parametrize(("loss", "slope"), [("l2", 2.0), ("huber", 1.0)])
def test_squared_errors_without_retention_are_the_delta_rule(loss, slope):
    """Its decay comes before the key reads, this family's after: beta and values make up for it."""
    torch.manual_seed(2)
    rule = MirasRule(loss)
    (q, k, v, log_decay, rate), memory, _ = inputs(21, rule, 1, per_head=True)
    far = torch.full_like(v, 1e9) if loss == "huber" else None  # never reached
    found, state = run([q, k, v, log_decay, rate], memory, far, rule, chunk_size=1)
    decay = log_decay.exp()
    expected, last = delta_rule(
        q,
        k,
        decay[..., None] * v,
        slope * rate / decay,
        log_decay=log_decay,
        scale=1.0,
        initial_state=memory[0][None],
    )
    assert relative_error(found, expected) < 1e-12
    assert relative_error(memory[0] + state.now[0], last) < 1e-12


def test_a_step_of_moneta_by_hand():
    """Cubed errors, the gradient at the W before it, A divided by the square of its 4-norm."""
    torch.manual_seed(3)
    rule = MirasRule("lp", 3.0, "norm", 4.0)
    (q, k, v, log_decay, rate), (a,), _ = inputs(1, rule, 1, heads=1, per_head=True)

    def weights(a):
        return a / a.abs().pow(4).sum().sqrt()

    w = weights(a[0]).requires_grad_()
    loss = (k[0, 0, 0] @ w - v[0, 0, 0]).abs().pow(3).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    new = log_decay.exp() * a[0] - rate * gradient
    output, _ = run([q, k, v, log_decay, rate], [a], None, rule, chunk_size=1)
    assert relative_error(output[0, 0], q[0, 0] @ weights(new[0])) < 1e-5  # |e| is smoothed


@pytest.mark.parametrize("layers", [1, 2])
def test_a_memory_without_rates_and_decays_stands(layers):
    torch.manual_seed(4)
    (q, k, v, log_decay, rate), memory, _ = inputs(9, RULES[0], layers)
    output, state = run([q, k, v, 0 * log_decay, 0 * rate], memory, None, RULES[0], chunk_size=4)
    x = q[0].transpose(0, 1)
    expected = x @ memory[0]
    if layers == 2:
        expected = x + F.layer_norm(F.gelu(expected) @ memory[1], (3,), eps=1e-5)
    assert relative_error(output[0].transpose(0, 1), expected) < 1e-12
    assert all(float(a.norm()) < 1e-12 for a in state.now)


def test_chunks_are_exact_where_keys_do_not_overlap():
    torch.manual_seed(5)
    (q, _, v, log_decay, rate), memory, _ = inputs(4, RULES[0], 1, k_dim=4, per_head=True)
    k = torch.linalg.qr(torch.randn(4, 2, 4).double().transpose(0, 1))[0].transpose(0, 1)[None]
    tokens = [q, k, v, 0 * log_decay, rate]
    once, _ = run(tokens, memory, None, RULES[0], chunk_size=4)
    assert relative_error(once, run(tokens, memory, None, RULES[0], chunk_size=1)[0]) < 1e-12
    other = [q, F.normalize(k + 1, dim=-1), *tokens[2:]]
    once, _ = run(other, memory, None, RULES[0], chunk_size=4)
    assert relative_error(once, run(other, memory, None, RULES[0], chunk_size=1)[0]) > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_every_column_of_a_softmax_sums_to_one(chunk_size):
    torch.manual_seed(6)
    rule = RULES[-1]
    (q, k, v, log_decay, rate), memory, _ = inputs(11, rule, 1)
    tokens = [torch.ones_like(q), k, v, log_decay, rate]
    output, state = run(tokens, memory, None, rule, chunk_size=chunk_size)
    assert float((output - 1).abs().max()) < 1e-12
    kept = memory[0].log_softmax(-2) + state.now[0]
    unit = kept.exp().sum(-2)  # the logarithm of W at the end of a chunk, 11 is not one of 4
    assert (float((unit - 1).abs().max()) < 1e-12) == (chunk_size == 1)


def test_the_mirror_map_grows_with_a_and_the_norm_shrinks():
    a = torch.randn(3, 4, 5, dtype=torch.float64)
    mirror, norm = (MirasRule("lp", 3.0, name, 4.0) for name in ("mirror", "norm"))
    assert relative_error(mirror.weights(3 * a), 3 * mirror.weights(a)) < 1e-12
    assert relative_error(norm.weights(3 * a), norm.weights(a) / 3) < 1e-12
    zeros = torch.zeros_like(a).requires_grad_()
    for rule in (mirror, norm):
        (gradient,) = torch.autograd.grad(rule.weights(zeros).sum(), zeros)
        assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("backend", ["recurrent", "chunked"])
def test_packed_sequences_are_isolated_bit_for_bit(backend):
    torch.manual_seed(7)
    tokens, memory, _ = inputs(19, RULES[1], 2, dtype=torch.float32)
    changed = [torch.cat([x[:, :7] / 2, x[:, 7:]], 1) for x in tokens]
    results = []
    for case in (tokens, changed):
        case = [x.detach().requires_grad_() for x in case]
        options = {"sequences": Sequences.from_lengths([7, 12]), "chunk_size": 4}
        output, state = run(case, memory, None, RULES[1], backend=backend, **options)
        gradients = torch.autograd.grad(output[:, 7:].square().sum(), case)
        assert all(bool((g[:, :7] == 0).all()) for g in gradients)
        results.append([output[:, 7:], state.now[0][1], *(g[:, 7:] for g in gradients)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.loss}-{rule.retention}")
def test_lower_precisions_are_close(rule):
    torch.manual_seed(8)
    tokens, memory, threshold = inputs(40, rule, 2 if rule.p > 1 else 1, k_dim=12)
    exact, _ = run(tokens, memory, threshold, rule)
    limit = None if threshold is None else threshold.float()
    found, state = run([x.float() for x in tokens], memory, limit, rule)
    assert relative_error(found, exact) < 1e-3
    narrow, _ = run([x.bfloat16() for x in tokens], memory, limit, rule)
    assert narrow.dtype == torch.bfloat16
    assert state.now[0].dtype == torch.float32
    assert relative_error(narrow, exact) < 5e-2


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_no_tokens_and_no_rows(shape):
    tokens, memory, _ = inputs(1, RULES[0], 2)
    tokens = [x.new_zeros(*shape, *x.shape[2:]) for x in tokens]
    output, state = run(tokens, memory, None, RULES[0])
    assert output.shape == tokens[2].shape
    assert state.now[0].shape == (shape[0], *memory[0].shape)
    assert not state.now[0].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backend": "fast"}, "miras: backend is 'fast', expected one of"),
        ({"rule": {"loss": "l1"}}, "loss is 'l1', expected one of"),
        ({"rule": {"retention": "none"}}, "retention is 'none', expected one of"),
        ({"rule": {"norm": 1.5}}, "norm 1.5, expected at least 1 and at least 2"),
        ({"rule": {"loss": "huber"}}, "threshold is missing with the loss 'huber'"),
        ({"chunk_size": 0}, "chunk_size is 0, expected at least 1"),
        ({"memory": []}, "memory has 0 matrices, expected 1 or 2"),
        ({"memory": [torch.zeros(2, 3, 4), torch.zeros(2, 4, 3)]}, "keys have 3 channels and val"),
        ({"memory": [torch.zeros(2, 4, 4)]}, r"memory\[0\] is \(2, 4, 4\), expected \(2, 3, 4\)"),
        ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens ends at 5, but there are 8 tokens"),
        (
            {"initial_state": MirasState((), (), torch.zeros(1))},
            "initial_state has 0 and 0 matrices, expected 1 of both",
        ),
    ],
)
def test_wrong_arguments_are_named(change, message):
    tokens, memory, _ = inputs(8, RULES[0], 1)
    options: dict[str, Any] = {"memory": memory, "rule": RULES[0], **change}
    if isinstance(options["rule"], dict):
        options["rule"] = MirasRule(**options["rule"])
    with pytest.raises(ValueError, match=message):
        run(tokens, options.pop("memory"), None, options.pop("rule"), **options)
