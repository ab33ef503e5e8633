"""Ops on segments of a row, on 2 and on 4 processes, against the whole row on one."""

from __future__ import annotations

import json

import pytest
import torch

from pretrain.data.sequences import Sequences, segment_of
from pretrain.ops import RATState, attention, rat
from tests.helpers.across_cases import CASES
from tests.helpers.across_worker import RING
from tests.helpers.processes import run_on

NAMES = [case.name for case in CASES]


def results(*arguments):
    output = run_on(4, "tests.helpers.across_worker", *arguments, timeout=600)
    return json.loads(output.splitlines()[-1])


@pytest.fixture(scope="module")
def found():
    return results()


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_a_segment_gives_what_the_whole_row_does(found, name, size):
    assert found[f"{name} on {size}"] < 1e-10


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_sequences_are_isolated_bit_for_bit(found, name, size):
    assert found[f"{name}: touched on {size}"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_only_crossing_sequences_are_sent(found, name):
    for size in (2, 4):
        assert found[f"{name}: sent apart on {size}"] == 0
        assert found[f"{name}: sent on {size}"] >= 2  # forward and backward


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", sorted(RING))
def test_states_that_go_from_rank_to_rank_are_those_that_are_gathered(found, name, size):
    assert found[f"{name}: ring on {size}"] < 1e-10
    assert found[f"{name}: ring gathers on {size}"] == 0


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("check", ["halo", "scan", "heads", "constants"])
def test_exchanges_alone(found, check, size):
    assert found[f"check_{check} on {size}"] < 1e-10


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("linear_attention 0 head 0.3 True 6", 2),  # a gather each way
        ("delta_rule 1 head 0.3 True 6", 2),
        ("diagonal_scan torch.float64 True", 2),
        ("short_convolution 4 True True", 2),
        ("attention 4 2 7 auto", 2),
        ("attention 4 2 None auto", 4),  # to heads and back
        ("attention 3 1 None auto", 6),  # keys, queries and outputs
        ("rat 4 5", 4),
        ("m2rnn 1 1 4 True None", 4),
    ],
)
def test_exchanges_are_few(found, name, count):
    assert found[f"{name}: sent on 4"] == count


def test_states_that_are_not_divided_are_refused():
    pieces = segment_of(Sequences.from_lengths([8]), 1, 2, group="never reached")
    x, keys = torch.zeros(1, 4, 2, 2), torch.zeros(1, 6, 2, 2)
    with pytest.raises(ValueError, match="attention: sequences_k is given for a segment"):
        attention(x, keys, keys, sequences=pieces, sequences_k=Sequences.from_lengths([6]))
    empty = torch.zeros(0, 2, 2)
    state = RATState(empty, empty, x[0, :1], x[0, :1], torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="rat: initial_state is given for a segment"):
        rat(x, x, x, x, sequences=pieces, initial_state=state)


@pytest.mark.slow
def test_float32_states_after_131072_tokens_are_right():
    errors = results("long")
    assert max(errors.values()) < 1e-5
