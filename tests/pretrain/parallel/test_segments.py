"""Every mixer over the segments of a row equals itself over the whole row, in real processes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pretrain.nn.mixers import registry
from tests.helpers import segment_worker
from tests.helpers.processes import run_on

pytestmark = [pytest.mark.usefixtures("processes"), pytest.mark.slow]

NEWTON = ("para_gru", "para_lstm")


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("segments") / "results.json"
    run_on(4, segment_worker.__name__, file)
    found: dict[str, Any] = json.loads(file.read_text())
    return found


@pytest.mark.parametrize("name", sorted(registry()))
def test_outputs_states_and_gradients_are_those_of_the_whole_row(name, four_processes):
    cases = {key: error for key, error in four_processes.items() if key.split()[0] == name}
    assert len(cases) >= 2 * len(segment_worker.LAYOUTS)
    limit = 1e-9 if name in NEWTON else 1e-10
    assert {key: error for key, error in cases.items() if not error[0] <= limit} == {}
