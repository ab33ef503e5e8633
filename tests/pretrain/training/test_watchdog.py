"""What counts as moving on: other work, or a step of the same."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.run_directory import RunDirectory
from pretrain.training import watchdog as module
from pretrain.training.watchdog import Watchdog

pytestmark = pytest.mark.usefixtures("processes")


@pytest.fixture
def watched(monkeypatch, tmp_path):
    """(what says its beats, what was left for, seconds that pass)."""
    clock = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    dog: Any = Watchdog(100.0, RunDirectory(tmp_path))
    words: dict[str, bytes] = {}
    dog._size = 2
    dog._store = SimpleNamespace(get=words.__getitem__, check=lambda keys: keys[0] in words)
    left: list[str] = []
    dog._leave = lambda message, status: left.append(message)
    beats = 0

    def after(seconds, other="0:waiting"):
        nonlocal beats
        beats += 1
        clock[0] += seconds
        words["beat-0"] = f"{beats}:{dog._steps}:{dog._work}".encode()
        words["beat-1"] = f"{beats}:{other}".encode()
        dog._listen()
        dog._check()

    return dog, after, left


def test_work_that_goes_on_may_take_long(watched):
    dog, after, left = watched
    dog.at("evaluating step 8")
    for _ in range(6):
        after(60)
        dog.moving()
    assert not left
    after(60)
    after(60)
    after(60)
    assert "longer than parallel.timeout_minutes" in left[0]


def test_the_same_work_without_a_step_is_hanging(watched):
    dog, after, left = watched
    dog.at("step 8")
    after(0, "0:step 8")
    for _ in range(3):
        after(50, "0:step 8")
    assert left == [
        "every process has been at step 8 for 150 s, longer than parallel.timeout_minutes"
    ]
