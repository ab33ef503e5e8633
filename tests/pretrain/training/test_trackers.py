"""Mirrors of the metrics, with a stand-in for Weights & Biases."""

from __future__ import annotations

import re
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

    class Begun:
        def log(self, values, step):
            module.logged.append((step, values))

        def finish(self):
            module.finished += 1

    def init(**settings):
        module.begun.append(settings)
        return Begun()

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_every_run_directory_has_a_run_of_its_own(wandb, tmp_path, monkeypatch):
    config = LoggingConfig(wandb="offline")
    monkeypatch.chdir(tmp_path)
    for path in ("a/lr=1", "b/lr=1", tmp_path / "a" / "lr=1", "a/" + 100 * "x"):
        (tracker,) = open_trackers(config, RunDirectory(path), 0)
        tracker.record({"step": 1, "loss": 2.0})
        tracker.close()
    ids = [settings["id"] for settings in wandb.begun]
    assert ids[0] == ids[2], "a resume continues it, however the path is written"
    assert len(set(ids)) == 3
    assert all(re.fullmatch("[A-Za-z0-9_-]{1,64}", each) for each in ids)
    assert [settings["name"] for settings in wandb.begun[:2]] == ["lr=1", "lr=1"]
    assert wandb.logged == 4 * [(1, {"step": 1, "loss": 2.0})]
    assert wandb.finished == 4


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
