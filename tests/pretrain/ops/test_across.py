"""Ops on segments of a row, on 2 and on 4 processes, against the whole row on one."""

from __future__ import annotations

import json

import pytest

from tests.helpers.across_cases import CASES
from tests.helpers.processes import run_on


@pytest.fixture(scope="module")
def errors():
    return json.loads(run_on(4, "tests.helpers.across_worker", timeout=300).splitlines()[-1])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_segment_gives_what_the_whole_row_does(errors, name, size):
    assert errors[f"{name} on {size}"] < 1e-10
