"""Large models are made in the parts that processes hold, and the parts make up the model."""

import json

import pytest

from tests.helpers import processes

MEMORY = 24e9  # bytes, of the machine


def run(code):
    """In an interpreter of its own, which then is one process of many, one after another."""
    done = processes.run("tests.helpers.shard_worker", code)
    assert done.returncode == 0, done.stderr
    return json.loads(next(x for x in done.stdout.splitlines() if x.startswith("{")))


@pytest.mark.slow
def test_seven_billion_parameters_are_built_process_by_process():
    found = run("build_seven_billion")
    assert found["total"] == found["expected"] > 6.8e9
    assert found["most"] < 0.05 * found["expected"]
    assert found["peak"] < MEMORY / 4


def test_large_parameters_are_alike_however_they_are_divided():
    found = run("compare_parts")
    assert found["differ"] == []
    assert found["large"] >= 4 and found["distinct"]
    assert found["spread"] < 0.01
