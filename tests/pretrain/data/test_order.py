"""The order of samples over phases: nothing twice, whatever the processes, lengths and mixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, cast

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.common.config_loader import build_config
from pretrain.config import RunConfig
from pretrain.data.batches import PreparedData, TrainingBatches
from pretrain.data.order import blend, permute, shares_of, unpermute
from pretrain.data.packing import PackedRows, best_fit, cut_documents
from pretrain.training.phases import windows_of

EOD = 0


def stream_of(count: int, lengths: Sequence[int] = (), first: int = 0) -> Any:
    """A stream whose token i is ``first`` + i + 1, so that a token says where it is from."""
    return _Numbers(count, lengths, first)


class _Numbers:
    def __init__(self, count, lengths, first):
        self.count, self.lengths, self.first, self.shards = count, list(lengths), first, [self]

    def __len__(self):
        return self.count

    def read(self, start, count):
        assert start >= 0 and start + count <= self.count
        return np.arange(start + 1, start + count + 1) + self.first

    def document_lengths(self):
        return np.array(self.lengths, np.int64)


class Tokenizer:
    eod_id, sha256 = EOD, "0"


def mixed(streams, weights):
    names = [name for name, weight in weights.items() if weight]
    return PreparedData(
        cast(Any, Tokenizer()),
        names,
        [float(weights[name]) for name in names],
        [streams[name] for name in names],
        [],
        0.0,
    )


def planned(phases, tokens, carry_steps=None, **data):
    carried = {} if carry_steps is None else {"carry_state": True, "carry_steps": carry_steps}
    config = build_config(
        RunConfig,
        {
            "name": "x",
            "model": {"hidden_size": 8, "pattern": "attn"},
            "data": {"path": "x", **data},
            "train": {"tokens": tokens, "seq_len": 8, "global_batch_tokens": 64, **carried},
            "parallel": {"micro_batch_size": 1},
            "phases": phases,
        },
        "x",
    )
    return config.plan


@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.integers(0, 300))
def test_shares_are_those_of_the_blend(parts, count):
    weights = [Fraction(part, sum(parts)) for part in parts]
    seen = Counter(blend(index, weights)[0] for index in range(count))
    assert shares_of(count, weights) == [seen[source] for source in range(len(parts))]


PHASE = st.fixed_dictionaries(
    {
        "share": st.integers(1, 6),
        "seq_len": st.sampled_from([4, 8, 16]),
        "global_batch_tokens": st.sampled_from([64, 128]),
        "window": st.sampled_from([16, 32]),
        "weights": st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)).filter(any),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(PHASE, min_size=1, max_size=4),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8)), max_size=2),
)
def test_no_sample_comes_twice_before_a_source_is_used_up(drawn, seed, skips):
    """Nor does any token, in phases of other lengths, batches and mixes, and after rollbacks.

    Windows that become longer or shorter on the way are those of runs that were changed.
    """
    total = sum(phase["share"] for phase in drawn)
    ends = np.cumsum([phase["share"] for phase in drawn])
    streams = {name: stream_of(32 * 2000 + 1) for name in "abc"}
    plan = planned(
        [
            {
                "until": 1 if end == total else float(Fraction(int(end), total)),
                "seq_len": phase["seq_len"],
                "global_batch_tokens": phase["global_batch_tokens"],
            }
            for phase, end in zip(drawn, ends, strict=True)
        ],
        tokens=24 * 128,  # so that every phase has a step
        window=32,
    )
    mixes = [mixed(streams, dict(zip("abc", phase["weights"], strict=True))) for phase in drawn]
    windows = [phase["window"] for phase in drawn]
    batches = TrainingBatches.of_run(plan, mixes, windows, seed)
    offset = tuple((step, 64 * tokens) for step, tokens in skips)
    seen: dict[str, Counter[int]] = {name: Counter() for name in "abc"}
    for step in range(plan.num_steps):
        mix = batches.mix_at(step)
        before = batches._read_before(mix, offset)
        first = (batches._tokens_of(mix, step) + mix.skipped(offset)) // mix.seq_len
        for index in range(first, first + plan.batch_tokens(step) // mix.seq_len):
            source, window, token = batches.order.locate(mix, index, before)
            start = window * mix.window + token
            seen[mix.names[source]].update(range(start, start + mix.seq_len))
    assert sum(sum(counts.values()) for counts in seen.values()) == plan.tokens
    assert all(times == 1 for counts in seen.values() for times in counts.values())
    for size in (2, 4):  # and so are the batches of several processes together
        step = plan.num_steps - 1
        whole = batches.micro_batches(step, offset=offset)
        parts = [batches.micro_batches(step, rank, size, offset=offset) for rank in range(size)]
        merged = [b for group in zip(*parts, strict=True) for b in group]
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(whole, merged, strict=True))


def test_a_source_that_is_used_up_begins_again_in_another_order():
    streams = {"a": stream_of(16 * 10 + 1), "b": stream_of(16 * 1000 + 1)}
    plan = planned([{"until": 0.5, "seq_len": 4}, {"seq_len": 16}], tokens=64 * 20)
    mixes = [mixed(streams, {"a": 1, "b": 7}), mixed(streams, {"a": 1, "b": 1})]
    batches = TrainingBatches.of_run(plan, mixes, [16, 16], 0)
    windows = []
    for mix in batches.order.mixes:
        before = batches._read_before(mix, 0)
        for index in range(640 // mix.seq_len):
            source, window, token = batches.order.locate(mix, index, before)
            if mix.names[source] == "a" and token == 0:
                windows.append(window)
    assert sorted(windows[:10]) == list(range(10))
    assert sorted(windows[10:20]) == list(range(10))
    assert windows[:10] != windows[10:20]
    assert batches.epochs(plan.num_steps)[0] == (80 + 320) / 160


def test_longer_windows_than_before_pass_over_what_was_read_until_nothing_is_left():
    streams = {"a": stream_of(16 * 40 + 1)}
    plan = planned([{"until": 0.1, "seq_len": 4}, {"seq_len": 16}], tokens=64 * 20)
    batches = TrainingBatches.of_run(plan, [mixed(streams, {"a": 1})] * 2, [4, 16], 0)
    short, long = batches.order.mixes
    before = batches._read_before(short, 0)
    read = {batches.order.locate(short, index, before)[1] // 4 for index in range(32)}
    assert 16 < len(read) < 32  # windows of 16 of which some part was read
    before = batches._read_before(long, 0)
    windows = [batches.order.locate(long, index, before)[1] for index in range(40 - len(read) + 80)]
    free, first, second = np.split(windows, [40 - len(read), 80 - len(read)])
    assert set(free) == set(range(40)) - read
    assert sorted(first) == sorted(second) == list(range(40))
    assert list(first) != list(second)


@given(st.integers(1, 300), st.binary(min_size=1, max_size=8))
def test_permutations_are_undone(count, key):
    images = [permute(position, count, key) for position in range(count)]
    assert [unpermute(image, count, key) for image in images] == list(range(count))


def test_a_phase_that_changes_nothing_is_none():
    streams = {name: stream_of(16 * 200 + 1) for name in "ab"}
    data = mixed(streams, {"a": 1, "b": 2})
    one = planned([], tokens=64 * 20)
    other = planned([{"until": 0.33}, {"until": 0.4, "seq_len": 8}, {}], tokens=64 * 20)
    first, second = (
        TrainingBatches.of_run(plan, [data] * len(plan.phases), [16] * len(plan.phases), 0)
        for plan in (one, other)
    )
    for step in range(20):
        assert one.learning_rate(step) == other.learning_rate(step)
        for a, b in zip(first.micro_batches(step), second.micro_batches(step), strict=True):
            assert torch.equal(a.tokens, b.tokens)


@given(st.lists(st.integers(1, 32), max_size=60))
def test_best_fit_never_overfills_and_wastes_little(sizes):
    rows, count = best_fit(sizes, 32)
    filled: Counter[int] = Counter()
    for size, row in zip(sizes, rows, strict=True):
        filled[row] += size
    assert set(filled) == set(range(count))
    assert max(filled.values(), default=0) <= 32
    # At most one row is half empty, or two would be one.
    assert sum(total <= 16 for total in filled.values()) <= 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40))
def test_packed_rows_hold_every_token_once_and_cut_long_documents_alone(lengths):
    stream = stream_of(sum(lengths), lengths)
    rows = PackedRows(stream, 16, EOD)
    targets = []
    starts = np.cumsum([0, *lengths[:-1]])
    for number in range(len(rows)):
        row = rows.read(number)
        assert sum(row.lengths) == len(row.inputs) == len(row.targets) == 16
        targets += row.targets[: row.counted].tolist()
        assert (row.inputs[row.counted :] == EOD).all()
        at = 0
        for size in row.lengths[: len(row.lengths) - (row.counted < 16)]:
            first, *others = row.targets[at : at + size].tolist()
            assert others == list(range(first + 1, first + size))  # one piece of the stream
            assert row.inputs[at + 1 : at + size].tolist() == [first, *others][:-1]
            # The token before a document is the end of the one before it.
            assert row.inputs[at] == (first - 1 if first > 1 else EOD)
            document = int(np.searchsorted(starts, first - 1, side="right")) - 1
            assert first - 1 + size <= starts[document] + lengths[document]
            at += size
    assert sorted(targets) == list(range(1, sum(lengths) + 1))
    assert rows.cut == sum(length > 16 for length in lengths)


def batches_of(drawn, streams, tokens, seed=0, **settings):
    """The plan and the batches of drawn phases."""
    total = sum(phase["share"] for phase in drawn)
    ends = np.cumsum([phase["share"] for phase in drawn])
    phases = [
        {
            "until": 1 if end == total else float(Fraction(int(end), total)),
            "seq_len": phase["seq_len"],
            "global_batch_tokens": phase["global_batch_tokens"],
        }
        for phase, end in zip(drawn, ends, strict=True)
    ]
    plan = planned(phases, tokens, **settings)
    mixes = [mixed(streams, dict(zip("abc", phase["weights"], strict=True))) for phase in drawn]
    return plan, TrainingBatches.of_run(plan, mixes, windows_of(plan, None), seed)


def counted(batches):
    """Every target that counts."""
    return [int(t) for b in batches for t in b.targets[b.loss_mask > 0]]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(PHASE, min_size=1, max_size=4),
    st.lists(st.integers(1, 40), min_size=1, max_size=30),
    st.integers(0, 3),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 8)), max_size=2),
)
def test_no_token_of_packed_documents_comes_twice_over_lengths_mixes_and_rollbacks(
    drawn, lengths, seed, skips
):
    streams = {}
    for number, name in enumerate("abc"):  # no two sources have a token in common
        repeated = lengths * (8000 // sum(lengths) + 1)
        streams[name] = stream_of(sum(repeated), repeated, first=10**6 * number)
    plan, batches = batches_of(drawn, streams, 24 * 128, seed, packing="best_fit")
    offset = tuple((step, 64 * tokens) for step, tokens in skips)
    seen: Counter[int] = Counter()
    for step in range(plan.num_steps):
        whole = batches.micro_batches(step, offset=offset)
        seen.update(counted(whole))
        parts = [batches.micro_batches(step, rank, 2, offset=offset) for rank in range(2)]
        merged = [b for group in zip(*parts, strict=True) for b in group]
        assert [b.tokens.tolist() for b in merged] == [b.tokens.tolist() for b in whole]
    assert all(times == 1 for times in seen.values())


@settings(max_examples=25, deadline=None)
@given(st.lists(PHASE, min_size=1, max_size=4), st.integers(0, 3), st.integers(1, 5))
def test_rows_that_read_on_are_dealt_anew_where_a_phase_begins_and_nothing_comes_twice(
    drawn, seed, carry_steps
):
    streams = {name: stream_of(32 * 2000 + 1, first=10**6 * n) for n, name in enumerate("abc")}
    plan, batches = batches_of(drawn, streams, 24 * 128, seed, carry_steps=carry_steps, window=16)
    seen: Counter[int] = Counter()
    before = torch.empty(0)
    for step in range(plan.num_steps):
        whole, mix = batches.micro_batches(step), batches.mix_at(step)
        seen.update(counted(whole))
        parts = [batches.micro_batches(step, rank, 2) for rank in range(2)]
        merged = [b for group in zip(*parts, strict=True) for b in group]
        assert [b.tokens.tolist() for b in merged] == [b.tokens.tolist() for b in whole]
        targets = torch.cat([b.targets.view(-1, mix.seq_len) for b in whole])
        if step > mix.first:  # spans of so many windows end in turn
            goes_on = torch.tensor([c for b in whole for c in b.continues or ()])
            assert (targets[goes_on, 0] == before[goes_on, -1] + 1).all()
            spans = carry_steps * mix.window // mix.seq_len
            assert (~goes_on).sum() <= -(-len(goes_on) // spans)
        before = targets
    assert all(times == 1 for times in seen.values())


def test_what_is_left_of_packed_documents_is_read_to_the_end_before_anything_comes_again():
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 40, 60)]
    streams = {"a": stream_of(sum(lengths), lengths)}
    phases = [
        {"share": 1, "seq_len": n, "global_batch_tokens": 64, "weights": (1, 0, 0)}
        for n in (8, 32, 4, 16, 8)
    ]
    plan, batches = batches_of(phases, streams, 64 * 60, packing="best_fit")
    found = [counted(batches.micro_batches(step)) for step in range(plan.num_steps)]
    order = [token for step in found for token in step]
    epoch = sum(lengths)
    assert len(order) > 2 * epoch
    assert sorted(order[:epoch]) == list(range(1, epoch + 1))
    assert sorted(order[epoch : 2 * epoch]) == list(range(1, epoch + 1))
    # Where each phase begins rows have its length, and no piece is longer than that.
    for step, length in ((0, 8), (12, 32), (24, 4), (36, 16), (48, 8)):
        (batch, *_) = batches.micro_batches(step)
        assert batch.tokens.shape == (1, length)
    assert batches.describe_place(13, 0, 0).endswith("of the packed rows of what was left of a")


def test_cut_documents_are_counted():
    stream = stream_of(24, [8, 4, 8, 4])
    assert cut_documents(stream, 8) == (1, 4)  # the third, from 12 to 20
    assert cut_documents(stream, 12) == (0, 4)
