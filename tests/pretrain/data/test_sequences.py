"""Packed sequences: what is derived from them, once, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pretrain
from pretrain.data.sequences import Sequences
from pretrain.model.build import build_model
from pretrain.ops import (
    attention,
    comba,
    delta_rule,
    dplr,
    gdn2,
    linear_attention,
    m2rnn,
    newton_recurrence,
    para_gru,
    para_lstm,
    rat,
    rnn,
    short_convolution,
)
from tests.helpers.small_model import VOCAB, settings

LENGTHS = [3, 0, 5, 1]


def packed():
    return Sequences(torch.tensor([0, 3, 3, 8, 9]))


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 4))
def test_derived_quantities(lengths, count):
    given_tensor = Sequences(torch.tensor([0, *lengths]).cumsum(0))
    for sequences in (given_tensor, Sequences.from_lengths(lengths)):
        assert (sequences.count, sequences.num_tokens) == (len(lengths), sum(lengths))
        assert sequences.max_length == max(lengths, default=0)
        assert sequences.lengths == sequences.sizes.tolist() == lengths
        assert sequences.cu_seqlens.tolist() == sequences.on_host.tolist()
        assert sequences.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
        assert sequences.ids.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
        places = [t for n in lengths for t in range(n)]
        assert sequences.positions.tolist() == places
        left = [n - t for n in lengths for t in range(n)]
        assert sequences.last_tokens(count).tolist() == [
            i for i, rest in enumerate(left) if rest <= count
        ]


@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_rows_are_sequences(batch_size):
    rows = Sequences.of_rows(batch_size, 4, "cpu")
    assert rows.lengths == [4] * batch_size
    assert rows.cu_seqlens.tolist() == [4 * i for i in range(batch_size + 1)]
    assert rows.cu_seqlens.dtype == torch.int64


def test_everything_is_derived_once():
    sequences, calls = packed(), []

    def squares(of, power):
        calls.append(power)
        return of.positions**power

    for _ in range(2):
        assert sequences.derive(squares, 2).tolist() == [0, 1, 4, 0, 1, 4, 9, 16, 0]
    sequences.derive(squares, 3)
    assert calls == [2, 3]
    assert sequences.positions is sequences.positions
    assert sequences.chunk_layout(2) is sequences.chunk_layout(2)
    assert copy.deepcopy(sequences) is sequences


def test_what_is_derived_without_gradients_serves_training():
    sequences = Sequences.from_lengths(LENGTHS)
    with torch.inference_mode():
        derived = [sequences.cu_seqlens, sequences.ids, sequences.chunk_layout(2).token_index]
        derived += [Sequences.of_rows(2, 3, "cpu").cu_seqlens]
    assert not any(x.is_inference() for x in derived)


@pytest.mark.parametrize(
    "sequences", [packed(), Sequences.from_lengths(LENGTHS), Sequences.of_rows(2, 3, "cpu")]
)
def test_lengths_stay_known_on_another_device(sequences):
    assert sequences.to("cpu") is sequences
    moved = sequences.to("meta")  # has no values to ask for
    assert moved.device.type == moved.cu_seqlens.device.type == "meta"
    assert moved.lengths == sequences.lengths
    assert moved.on_host.tolist() == sequences.cu_seqlens.tolist()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sequences(torch.tensor([0.0, 1.0])), r"must be a vector of integers \[N \+ 1\]"),
        (lambda: Sequences(torch.tensor([False, True])), "found .* torch.bool"),
        (lambda: Sequences(torch.tensor([0, 1], dtype=torch.int16)), "int32 or int64, found"),
        (lambda: Sequences(torch.tensor([0, 1j])), "int32 or int64, found"),
        (lambda: Sequences(torch.tensor([[0, 1]])), r"must be a vector .* found \(1, 2\)"),
        (lambda: Sequences(torch.tensor([], dtype=torch.int64)), "must be a vector of integers"),
        (lambda: Sequences(torch.tensor([0, 2, 1])).lengths, "must start at 0 and never fall"),
        (lambda: Sequences(torch.tensor([1, 2])).lengths, "must start at 0 and never fall"),
        (lambda: Sequences.from_lengths([2, -1]), r"must be at least 0, found \[2, -1\]"),
    ],
)
def test_what_is_no_packing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_list_is_refused_by_its_name():
    numbers: Any = [0, 3]
    with pytest.raises(TypeError, match="cu_seqlens is a list, expected a tensor"):
        Sequences(numbers)
    layer = pretrain.mixer("attn", hidden_size=32)
    for keyword in ("sequences", "cu_seqlens"):
        with pytest.raises(TypeError, match=f"the layer: {keyword} is a list, expected a Seq"):
            layer(torch.zeros(1, 3, 32), **{keyword: numbers})


@pytest.mark.parametrize("pattern", ["attn", "swa", "gdn"])
def test_sequences_that_do_not_fit_are_refused_before_any_layer(pattern):
    model = pretrain.build_model(pattern, hidden_size=32, vocab_size=40)
    layer = pretrain.mixer(pattern, hidden_size=32)
    cu_seqlens = torch.tensor([0, 5, 12])
    calls = (model, model.hidden_states, model.states, lambda x, **o: model(x, x, **o))
    for rows, length, message in ((1, 20, "ends at 12, but there are 20"), (2, 12, "must be 1")):
        tokens = torch.zeros(rows, length, dtype=torch.int64)
        for call in calls:
            with pytest.raises(ValueError, match=f"the model: .*{message}"):
                call(tokens, cu_seqlens=cu_seqlens)
        with pytest.raises(ValueError, match=f"the layer: .*{message}"):
            layer(torch.zeros(rows, length, 32), cu_seqlens=cu_seqlens)


def test_both_keywords_mean_the_same_everywhere():
    model = pretrain.build_model("attn gdn", hidden_size=32, vocab_size=40, init_std=0.2)
    layer = pretrain.mixer("attn", hidden_size=32, std=0.2)
    cu_seqlens, tokens = torch.tensor([0, 5, 12]), torch.arange(12)[None]
    x = model.hidden_states(tokens, cu_seqlens=cu_seqlens)
    assert torch.equal(x, model.hidden_states(tokens, sequences=cu_seqlens))
    assert torch.equal(layer(x, cu_seqlens=cu_seqlens)[0], layer(x, sequences=cu_seqlens)[0])
    for a, b in zip(
        model.states(tokens, cu_seqlens=cu_seqlens),
        model.states(tokens, sequences=Sequences(cu_seqlens)),
        strict=True,
    ):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("sequences", [packed(), Sequences.from_lengths(LENGTHS)])
def test_a_default_device_moves_nothing(sequences):
    expected, layout = packed(), packed().chunk_layout(2)
    with torch.device("meta"):
        moved = sequences.chunk_layout(2)
        found = [sequences.on_host, sequences.last_tokens(2), sequences.ids, sequences.positions]
    for a, b in zip(
        found,
        [expected.on_host, expected.last_tokens(2), expected.ids, expected.positions],
        strict=True,
    ):
        assert torch.equal(a, b)
    for name in ("token_index", "order", "token_slot"):
        assert torch.equal(getattr(moved, name), getattr(layout, name))


def _calls():
    """Every op with a packing as keywords; the first of its results."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(1, 9, *shape, dtype=torch.float64, generator=generator)

    q, k, v, g, u = draw(2, 4), draw(2, 4), draw(2, 4), draw(2), draw(3, 4)
    weight, a, x, heads = draw(4)[0, :4], draw(4)[0, :3], draw(4), draw(4, 2, 4)
    square, recurrent = draw(2, 4, 4)[0, 0], draw(2, 4, 4, 4)[0, 0]

    def step(h, inner, p):
        return torch.tanh(p[:1] * h + inner)

    return {
        "attention": lambda **o: attention(q, k, v, **o),
        "linear_attention": lambda **o: linear_attention(q, k, v, log_decay=-g, **o)[0],
        "delta_rule": lambda **o: delta_rule(q, k, v, g, **o)[0],
        "dplr": lambda **o: dplr(q, k, v, -k, q, **o)[0],
        "gdn2": lambda **o: gdn2(q, k, v, k, v, log_decay=-q, **o)[0],
        "comba": lambda **o: comba(q, k, v, k, g, log_decay=-g, **o)[0],
        "m2rnn": lambda **o: m2rnn(q, k, v, square, g, **o)[0],
        "rnn": lambda **o: rnn(heads, recurrent, None, **o)[0],
        "rat": lambda **o: rat(q, k, v, torch.sigmoid(v), chunk_size=2, **o)[0],
        "para_gru": lambda **o: para_gru(u, a / 2, **o)[0],
        "para_lstm": lambda **o: para_lstm(u, a / 2, a[:2] / 2, **o)[0],
        "newton_recurrence": lambda **o: newton_recurrence(step, x[:, :, None], a / 2, **o)[0],
        "short_convolution": lambda **o: short_convolution(x, weight[:, :3], **o)[0],
    }


@pytest.mark.parametrize("op", list(_calls()))
def test_ops_take_sequences_in_three_forms_and_not_in_two_at_once(op):
    call, sequences = _calls()[op], packed()
    expected = call(sequences=sequences)
    assert torch.equal(call(sequences=sequences.cu_seqlens), expected)
    assert torch.equal(call(cu_seqlens=sequences.cu_seqlens), expected)
    assert not torch.equal(call(), expected)
    with pytest.raises(ValueError, match=f"{op}: sequences and cu_seqlens are both given"):
        call(sequences=sequences, cu_seqlens=sequences.cu_seqlens)


@pytest.mark.usefixtures("processes")
def test_a_model_takes_sequences_in_three_forms_and_not_in_two_at_once():
    model = build_model(settings(), VOCAB, seed=0)
    tokens, sequences = torch.arange(9)[None] % VOCAB, packed()
    expected = model(tokens, sequences=sequences)
    assert torch.equal(model(tokens, sequences=sequences.cu_seqlens), expected)
    assert torch.equal(model(tokens, cu_seqlens=sequences.cu_seqlens), expected)
    with pytest.raises(ValueError, match="sequences and cu_seqlens are both given"):
        model(tokens, sequences=sequences, cu_seqlens=sequences.cu_seqlens)


def test_attention_takes_the_sequences_of_its_keys_likewise():
    q, k = torch.randn(1, 4, 2, 4), torch.randn(1, 9, 2, 4)
    queries, keys = Sequences.from_lengths([1, 0, 3, 0]), packed()
    expected = attention(q, k, k, sequences=queries, sequences_k=keys)
    found = attention(q, k, k, cu_seqlens=queries.cu_seqlens, cu_seqlens_k=keys.cu_seqlens)
    assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="attention, of the keys: sequences and cu_seqlens"):
        attention(q, k, k, sequences=queries, sequences_k=keys, cu_seqlens_k=keys.cu_seqlens)
