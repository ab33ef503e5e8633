"""Mirrors of the metrics, with a stand-in for Weights & Biases."""

from __future__ import annotations

import re
import shutil
import sys
import types
from typing import Any

import pytest

from pretrain.common.errors import UserError
from pretrain.config import LoggingConfig
from pretrain.run_directory import RunDirectory
from pretrain.training.log import RunLog
from pretrain.training.trackers import open_trackers


@pytest.fixture
def wandb(monkeypatch):
    """A module that notes what is begun, logged and finished."""
    module: Any = types.ModuleType("wandb")
    module.begun, module.logged, module.finished = [], [], 0

    module.runs = {}

    class Begun:
        """As W&B does, drops steps below the last one, and goes on after it when resumed."""

        def __init__(self, key):
            self.key, self.summary = key, {}
            self.rows = module.runs.setdefault(key, [])
            self.step = max((step for step, _ in self.rows), default=-1) + 1

        def log(self, values, step):
            module.logged.append((step, values))
            if step >= self.step:
                self.step = step
                self.rows.append((step, values))

        def finish(self):
            module.finished += 1

    def init(**settings):
        module.begun.append(settings)
        return Begun(settings["id"])

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def begin(path, step=0, *, repeats=False):
    path = RunDirectory(path)
    path.path.mkdir(parents=True, exist_ok=True)
    (tracker,) = open_trackers(LoggingConfig(wandb="offline"), path, step, repeats=repeats)
    return tracker


def steps_of(rows):
    return [values["step"] for _, values in rows]


def test_every_run_directory_has_a_run_of_its_own(wandb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, step in (
        ("a/lr=1", 0),
        ("b/lr=1", 0),
        (tmp_path / "a" / "lr=1", 1),
        ("a/" + 100 * "x", 0),
    ):
        tracker = begin(path, step)
        tracker.record({"step": step + 1, "loss": 2.0})
        tracker.close()
    ids = [settings["id"] for settings in wandb.begun]
    assert ids[0] == ids[2], "a resume continues it, however the path is written"
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", each) for each in ids)
    assert [settings["name"] for settings in wandb.begun[:2]] == ["lr=1", "lr=1"]
    assert steps_of(wandb.runs[ids[0]]) == [1, 2]
    assert wandb.finished == 4


def test_a_run_that_begins_again_is_another_one(wandb, tmp_path):
    """As after its directory was removed, or where it was killed before its first checkpoint."""
    begin(tmp_path / "run").close()
    begin(tmp_path / "run", 0, repeats=True).close()
    shutil.copytree(tmp_path / "run", tmp_path / "copy" / "run")
    begin(tmp_path / "run", 5).close()
    begin(tmp_path / "copy" / "run", 5).close()
    ids = [settings["id"] for settings in wandb.begun]
    assert len({ids[0], ids[1], ids[3]}) == 3, "a copy is another run too"
    assert ids[1] == ids[2]


def test_steps_that_are_repeated_begin_a_new_segment(wandb, tmp_path):
    tracker = begin(tmp_path / "run")
    for step in range(1, 8):
        tracker.record({"step": step, "loss": float(step)})
    tracker.rewind(4)
    for step in range(4, 7):
        tracker.record({"step": step, "loss": -float(step)})
    tracker.close()
    begin(tmp_path / "run", 6).close()  # a resume that repeats nothing
    tracker = begin(tmp_path / "run", 5, repeats=True)  # killed after step 6, saved at 5
    tracker.record({"step": 6, "loss": 0.0})
    tracker.close()
    first, second, again, third = (settings["id"] for settings in wandb.begun)
    assert steps_of(wandb.runs[first]) == [1, 2, 3, 4, 5, 6, 7]
    assert steps_of(wandb.runs[second]) == [4, 5, 6]
    assert (again, steps_of(wandb.runs[third])) == (second, [6])
    shown = ["run", "run from step 4", "run from step 4", "run from step 5"]
    assert [settings["name"] for settings in wandb.begun] == shown
    assert len({settings["group"] for settings in wandb.begun}) == 1
    assert len({first, second, third}) == 3


def test_a_line_of_the_last_step_is_not_lost_after_a_resume(wandb, tmp_path):
    """As an evaluation that was due when the run was stopped."""
    tracker = begin(tmp_path / "run")
    tracker.record({"step": 3, "loss": 1.0})
    tracker.close()
    tracker = begin(tmp_path / "run", 3)
    tracker.record({"step": 3, "valid_loss": 2.0})
    tracker.close()
    (rows,) = wandb.runs.values()
    assert [values for _, values in rows] == [
        {"step": 3, "loss": 1.0},
        {"step": 3, "valid_loss": 2.0},
    ]


def test_the_log_knows_which_lines_come_again(wandb, tmp_path):
    config = LoggingConfig(wandb="offline")
    directory = RunDirectory(tmp_path)

    def log_from(step, *steps):
        log = RunLog(directory, config, active=True, num_steps=9, step=step)
        for each in steps:
            log.record({"step": each, "tokens": each, "loss": 1.0})
        return log

    log = log_from(0, 1, 2, 3)
    log.rewind(2)
    log.record({"step": 3, "tokens": 3, "loss": 2.0})
    log.close()
    log_from(3, 4, 5).close()
    log_from(4, 5, 6).close()
    assert [steps_of(rows) for rows in wandb.runs.values()] == [[1, 2, 3], [3, 4, 5], [5, 6]]


def test_both_get_the_same_names(wandb, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = LoggingConfig(wandb="offline", tensorboard=True, blocks=1)
    directory = RunDirectory(tmp_path)
    log = RunLog(directory, config, active=True, num_steps=9, step=0)
    log.record({"step": 1, "tokens": 8, "loss": 1.5, "goodput": 0.5, "time/data": 0.25})
    log.blocks(1, 8, [{"block": 3, "mixer": "gdn", "horizon": 4.0, "gradient_rms": 0.125}])
    log.close()
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    found = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    (rows,) = wandb.runs.values()
    assert found == {name: value for _, values in rows for name, value in values.items()}
    assert {"loss", "goodput", "time/data", "blocks/3/horizon", "blocks/3/gradient_rms"} < set(
        found
    )


def test_a_missing_library_leaves_nothing_open(wandb, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = LoggingConfig(wandb="offline", tensorboard=True)
    closed, close = [], RunLog.close

    def note(log):
        close(log)
        closed.append(log)

    monkeypatch.setattr(RunLog, "close", note)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        RunLog(RunDirectory(tmp_path), config, active=True, num_steps=1, step=0)
    assert wandb.finished == 1
    assert len(closed) == 1
