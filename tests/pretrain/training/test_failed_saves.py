"""Saves that fail: the run goes on, saves later, and ends after ``checkpoint.retries``."""

from __future__ import annotations

import errno
import os
import re

import pytest

from pretrain.checkpoint import writer as checkpoint_writer
from pretrain.checkpoint_folders import list_checkpoints
from pretrain.common.errors import UserError
from pretrain.common.files import LinesFile
from pretrain.training.callbacks import Callback, save
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import Run

EVERY_STEP = ("sample.tokens=0", "logging.every=1", "validation.every=2", "checkpoint.every=1")
STEPS = 6

pytestmark = pytest.mark.usefixtures("no_groups")


@pytest.fixture
def run(tmp_path, corpus):
    return Run(tmp_path, corpus, "run", steps=STEPS)


@pytest.fixture
def full_at(monkeypatch):
    """Have saves of some numbers, counted from 1, find no room on the disk."""
    monkeypatch.setattr(save, "_PAUSE", 0.01)
    write, saves = checkpoint_writer.save_state, []

    def choose(numbers):
        def refuse(local, writing, group):
            saves.append(writing)
            if len(saves) in numbers:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(writing))
            write(local, writing, group)

        monkeypatch.setattr(checkpoint_writer, "save_state", refuse)

    return choose


def names(run):
    return [path.name for path in list_checkpoints(run.directory / "checkpoints")]


def log(run):
    return (run.directory / "log.txt").read_text()


class Names(Callback):
    """The newest checkpoint that is complete before each step."""

    def on_train_start(self):
        self.seen = []

    def before_step(self):
        self.trainer.writer.wait()
        done = list_checkpoints(self.trainer.run_directory.checkpoints)
        self.seen.append(done[0].name[-1] if done else None)


@pytest.mark.parametrize("background", [True, False])
def test_a_save_that_fails_is_told_and_made_up_for_by_the_next(
    run, tmp_path, corpus, full_at, background
):
    full_at({2, 3, 4, 6})
    overrides = (*EVERY_STEP, f"checkpoint.background={background}".lower())
    seen = Names()
    result = Trainer(run.config, overrides=overrides, callbacks=[seen]).fit()
    assert result.status == "completed"
    assert seen.seen == [None, "1", "1", "1", "1", "5"]  # nothing older is lost
    assert names(run) == ["step-00000006", "step-00000005"]
    text = log(run)
    assert len(re.findall(r"warning: cannot write checkpoint .*No space left on device", text)) == 4
    assert "the last complete one is step-00000001" in text
    assert "the run ends after 3 more saves in a row (checkpoint.retries)" in text
    assert "the run ends if the next save fails too (checkpoint.retries)" in text
    assert "saving step 6 again in 0.01 seconds" in text
    # The training itself does not know.
    other = Run(tmp_path, corpus, "other", steps=STEPS)
    full_at(set())
    Trainer(other.config, overrides=overrides).fit()
    assert other.losses == run.losses


@pytest.mark.parametrize("retries", [0, 2])
def test_the_run_ends_when_more_saves_in_a_row_fail(run, full_at, retries):
    full_at(range(2, 100))
    trainer = Trainer(run.config, overrides=(*EVERY_STEP, f"checkpoint.retries={retries}"))
    again = r" \(3 saves in a row have failed\)" if retries else ""
    message = f"cannot write checkpoint .*the last complete one is step-00000001{again}$"
    with pytest.raises(UserError, match=message):
        trainer.fit()
    assert names(run) == ["step-00000001"]
    full_at(set())
    assert Trainer(run.config, overrides=EVERY_STEP).fit().status == "completed"


def test_a_last_save_that_keeps_failing_ends_the_run_with_an_error(run, full_at):
    full_at(range(6, 100))
    with pytest.raises(UserError, match=r"step-00000006: .*\(3 saves in a row have failed\)"):
        Trainer(run.config, overrides=(*EVERY_STEP, "checkpoint.retries=2")).fit()
    assert names(run) == ["step-00000005", "step-00000004"]


def test_a_run_directory_that_comes_back_is_used_again(run):
    away = run.directory.with_name("away")

    class Move(Callback):
        def before_step(self):
            self.trainer.writer.wait()
            if self.trainer.state.step == 2:
                run.directory.rename(away)
            if self.trainer.state.step == 4:
                away.rename(run.directory)

    overrides = (*EVERY_STEP, "validation.every=100")
    assert Trainer(run.config, overrides=overrides, callbacks=[Move()]).fit().status == "completed"
    assert names(run) == ["step-00000006", "step-00000005"]
    assert log(run).count(f"warning: the run directory {run.directory} was removed") == 2
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("recovers", [True, False])
def test_lines_are_held_until_they_can_be_written(run, monkeypatch, capsys, recovers):
    full = False

    class Full:
        def __init__(self, file):
            self.file, self.room = file, 7

        def write(self, content):
            if not full:
                return self.file.write(content)
            if not self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = self.file.write(content[: self.room])  # the line is cut in two
            self.room -= written
            return written

        def close(self):
            self.file.close()

    class Fill(Callback):
        def before_step(self):
            nonlocal full
            step = self.trainer.state.step
            full = step >= 2 and (step < 4 or not recovers)

    begin = LinesFile.__init__

    def begin_full(self, path):
        begin(self, path)
        self._file = Full(self._file)

    monkeypatch.setattr(LinesFile, "__init__", begin_full)
    trainer = Trainer(run.config, overrides=EVERY_STEP, callbacks=[Fill()])
    if not recovers:
        with pytest.raises(UserError, match=r"cannot write .*(metrics.jsonl|log.txt): No space"):
            trainer.fit()
        assert "its last lines are lost" in capsys.readouterr().err
        return
    assert trainer.fit().status == "completed"
    assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, STEPS + 1))
    shown = capsys.readouterr().out
    assert "its lines are held in memory, to be written with the next save" in shown
    assert "that were held are written" in log(run)
