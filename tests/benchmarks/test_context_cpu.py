"""Layers that are handed on by their states take turns: what rank waits for what, in slots."""

from __future__ import annotations

import json

import pytest

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
