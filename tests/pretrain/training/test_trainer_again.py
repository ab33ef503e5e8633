"""``Trainer.fit`` several times in a process: each leaves what the next one, and a user, needs."""

from __future__ import annotations

import gc
import sys
import threading
import time

import numpy as np
import psutil
import pytest
import torch
import torch.distributed as dist

from pretrain.checkpoint import writer
from pretrain.common.errors import UserError
from pretrain.run_time import read_starts
from pretrain.training.callbacks import Callback
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")


class Interrupt(Callback):
    """Interrupts the first fit before a step."""

    def __init__(self, step, error=KeyboardInterrupt, *, request=False):
        self.step, self.error, self.request = step, error, request

    def before_step(self):
        if self.step == self.trainer.state.step + 1:
            self.step = None
            if self.request:
                self.trainer.request_stop("a user")
            raise self.error


def test_a_request_to_stop_does_not_outlive_an_exception(run):
    trainer = Trainer(run.config, overrides=QUICK, callbacks=[Interrupt(2, request=True)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    result = trainer.fit()
    assert (result.status, result.step) == ("completed", 4)


def test_fits_one_after_another_do_not_use_up_descriptors(tmp_path, corpus):
    """What holds a run's groups is found by the next one, should no collection happen between."""
    opened = []
    gc.disable()
    try:
        for name in "abc":
            config = Run(tmp_path, corpus, name, steps=2).config
            Trainer(config, overrides=QUICK).fit()
            opened.append(psutil.Process().num_fds())
    finally:
        gc.enable()
    assert opened[2] <= opened[1] + 5, opened


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_nothing_writes_after_an_interruption(run, monkeypatch, error):
    save_state = writer.save_state

    def save_slowly(*args):
        time.sleep(0.5)
        save_state(*args)

    monkeypatch.setattr(writer, "save_state", save_slowly)
    trainer = Trainer(run.config, overrides=QUICK, callbacks=[Interrupt(3, error)])
    with pytest.raises(error):
        trainer.fit()
    found = sorted(path.name for path in trainer.run_directory.checkpoints.iterdir())
    assert found == ["latest", "step-00000002"]
    assert not trainer.run_directory.is_locked()


def test_two_at_once_are_refused(run, tmp_path, corpus):
    other = Run(tmp_path, corpus, "other", steps=2)
    reached, go_on = threading.Event(), threading.Event()

    class Wait(Callback):
        def before_step(self):
            reached.set()
            assert go_on.wait(60)

    results = []
    first = Trainer(run.config, overrides=QUICK, callbacks=[Wait()])
    second = Trainer(other.config, overrides=QUICK)
    thread = threading.Thread(target=lambda: results.append(first.fit()))
    thread.start()
    assert reached.wait(60)
    with pytest.raises(UserError, match=f"another Trainer .* is training: {run.directory}; exp"):
        second.fit()
    assert dist.is_initialized(), "the groups of the first are left to it"
    go_on.set()
    thread.join()
    assert [result.status for result in results] == ["completed"]
    assert second.fit().status == "completed"


def test_what_belongs_to_the_process_is_as_before(run):
    hook = sys.excepthook
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    Trainer(run.config, overrides=QUICK).fit()
    assert sys.excepthook is hook
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    with pytest.raises(UserError):
        Trainer(run.config, overrides=["data.path=nowhere"]).fit()
    assert sys.excepthook is hook


def test_a_callback_of_two_trainers_belongs_to_the_one_that_trains(run, tmp_path, corpus):
    other = Run(tmp_path, corpus, "other", steps=2)

    class Step(Callback):
        def on_log(self, metrics):
            metrics["mine"] = self.trainer.num_steps

    callback = Step()
    trainers = [Trainer(x.config, overrides=QUICK, callbacks=[callback]) for x in (run, other)]
    assert [trainer.fit().step for trainer in trainers] == [4, 2]
    for each, steps in ((run, 4), (other, 2)):
        assert {row["mine"] for row in each.metrics if "loss" in row} == {steps}


def test_seconds_are_those_since_fit(run):
    trainer = Trainer(run.config, overrides=QUICK)
    trainer._start -= 1000
    trainer.fit()
    assert all(row["seconds"] < 500 for row in run.metrics if "loss" in row)


def test_time_goes_on_from_start_to_start(run):
    """What was logged before an interruption counts, also of a step that is done again."""
    trainer = Trainer(run.config, overrides=QUICK, callbacks=[Interrupt(4)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    before = run.metrics
    lost = next(row["total_seconds"] for row in before if row["step"] == 3 and "loss" in row)
    trainer._start -= 1000  # of no meaning: every fit has its own
    trainer.fit()
    rows = [row for row in run.metrics if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[:2] == [row for row in before if "loss" in row][:2]
    for row in rows[2:]:
        assert row["total_seconds"] == pytest.approx(lost + row["seconds"], abs=0.002)
        assert row["seconds"] < 500
    starts = read_starts(trainer.run_directory)
    assert [start["step"] for start in starts] == [0, 2]
    assert starts[1]["seconds_before"] == pytest.approx(lost, abs=0.002)
