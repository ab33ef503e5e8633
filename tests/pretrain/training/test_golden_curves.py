"""Training does what it did: the losses of 100 steps of every family, against recorded ones."""

import json

import pytest

from tests.helpers.golden_curves import FAMILIES, RECORD, STEPS
from tests.helpers.processes import run

RECORDED = json.loads(RECORD.read_text())


@pytest.fixture(scope="module")
def curves():
    done = run("tests.helpers.golden_curves", "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_those_recorded(curves, family):
    """In float32, whose rounding errors differ between CPUs and grow from step to step."""
    found, expected = curves[family], RECORDED[family]
    assert len(found) == STEPS and found[-1] < found[0] - 1
    assert found[:10] == pytest.approx(expected[:10], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-4)


def test_one_machine_finds_the_same_bits_twice(curves):
    for family, curve in curves["again"].items():
        assert curve == curves[family]
