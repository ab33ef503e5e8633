"""Every mixer over the segments of a row equals itself over the whole row, in real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pretrain.data.sequences import Sequences, segment_of
from pretrain.nn.mixers import registry
from tests.helpers import segment_worker
from tests.helpers.processes import run_on
from tests.helpers.small_mixers import SMALL

pytestmark = pytest.mark.usefixtures("processes")

NEWTON = ("para_gru", "para_lstm")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("segments") / "results.json"
    run_on(4, segment_worker.__name__, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [*sorted(registry()), "leaky_average"])
def test_outputs_states_and_gradients_are_those_of_the_whole_row(name, four_processes):
    cases = {key: error for key, error in four_processes.items() if key.split()[0] == name}
    assert len(cases) >= 2 * len(segment_worker.LAYOUTS)
    limit = 1e-9 if name in NEWTON else 1e-10
    assert {key: error for key, error in cases.items() if not error[0] <= limit} == {}


@pytest.mark.parametrize("name", ["attn", "gdn", "rat"])
def test_where_no_sequence_goes_on_nothing_is_sent(name):
    """There is nobody to send to: any message would fail."""
    block = segment_worker.block_of(name, SMALL[name][0])
    x = torch.randn(48, 1, 24, dtype=torch.float64)
    whole, _ = block(x, sequences=Sequences.from_lengths([12, 5, 7, 24]))
    nobody = object()
    pieces = segment_of(Sequences.from_lengths([12, 5, 7, 24]), 1, 2, nobody)
    found, _ = block(x[24:], sequences=pieces)
    assert torch.allclose(found, whole[24:], rtol=1e-12)


def test_a_segment_takes_no_state_from_elsewhere():
    block = segment_worker.block_of("gdn", SMALL["gdn"][0])
    x = torch.zeros(24, 1, 24, dtype=torch.float64)
    pieces = segment_of(Sequences.from_lengths([48]), 1, 2, object())
    with pytest.raises(ValueError, match="from the segment before, found one"):
        block(x, sequences=pieces, state=block.mixer.init_state(1))
