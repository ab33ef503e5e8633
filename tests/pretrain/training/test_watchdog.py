"""What counts as moving on: other work, or a step of the same."""

from __future__ import annotations

import threading
import time
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


@pytest.mark.parametrize("error", [None, KeyboardInterrupt()])
def test_no_thread_of_it_is_inside_of_the_store_when_the_process_ends(monkeypatch, tmp_path, error):
    """The interpreter would abort there: "terminate called without an active exception"."""
    inside = threading.Event()

    class SlowStore:
        def clone(self):
            return self

        def set(self, key, value):
            inside.set()
            time.sleep(0.3)

        def check(self, keys):
            return False

    monkeypatch.setattr(module, "_BEAT_SECONDS", 0.0)
    monkeypatch.setattr(module.dist.distributed_c10d, "_get_default_store", SlowStore)
    dog: Any = Watchdog(100.0, RunDirectory(tmp_path))
    dog._size = 2
    dog.__enter__()
    assert inside.wait(60)
    dog.__exit__(error and type(error), error, None)
    assert not dog._thread.is_alive()
