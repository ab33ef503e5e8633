"""What rank waits for what, in slots, and the work that segments of a row add."""

from __future__ import annotations

import json

import pytest

from benchmarks.context_cpu import products_ratio
from benchmarks.context_stagger import LAYERS
from tests.helpers.processes import run_on


@pytest.mark.slow
def test_a_chain_of_layers_staggers_over_ranks(tmp_path):
    run_on(4, "benchmarks.context_cpu", "stagger", "--worker", tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["ranks"] for row in rows] == [2, 4]
    for row in rows:
        forward, backward, checkpointed = (slots for _, slots in row["slots"])
        expected = LAYERS + row["ranks"] - 1
        assert forward == backward == expected
        # Each layer is computed again in a slot of its own, from what it has received before.
        assert checkpointed == expected + LAYERS


@pytest.mark.parametrize(
    ("name", "most"),
    [("delta rule 64 x 64", 1.24), ("delta rule 64 x 128, decay by channel", 1.25)],
)
def test_a_segment_of_a_delta_rule_takes_few_products_more_and_in_a_ring_none(name, most):
    gathered, in_ring = (products_ratio(name, ring=ring, tokens=256) for ring in (False, True))
    assert 1.1 < gathered < most
    assert in_ring == 1


@pytest.mark.parametrize("rank", [0, 2])
def test_where_a_document_begins_or_ends_a_delta_rule_takes_no_products_more(rank):
    assert products_ratio("delta rule 64 x 64", ring=False, tokens=256, rank=rank) < 1.02
