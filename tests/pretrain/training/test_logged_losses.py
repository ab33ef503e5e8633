"""The mean loss of the steps between two lines of the log, beside that of the last of them."""

from __future__ import annotations

import math

import pytest

from pretrain.run_directory import RunDirectory, overall_speed
from pretrain.training.callbacks import Callback
from pretrain.training.loss_curve import plot_loss_curve
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import Run

pytestmark = pytest.mark.usefixtures("no_groups")

SETTINGS = (
    *("sample.tokens=0", "validation.every=0", "checkpoint.every=3", "logging.every=5"),
    *("train.steps=17", "train.batch_warmup_steps=6", "train.batch_warmup_start=64"),
)
SKIPPED = (4, 7, 10)


class Watch(Callback):
    """Keeps every step's loss and tokens, leaves some steps out, and stops after one."""

    def __init__(self, stop_after=None):
        self.stop_after, self.seen = stop_after, {}

    def skip_update(self, loss):
        return self.trainer.state.step + 1 in SKIPPED

    def after_step(self, result):
        step = self.trainer.state.step
        tokens = self.trainer.config.train.batch_tokens(step - 1)
        self.seen[step] = (result.loss, tokens, result.applied)
        if step == self.stop_after:
            self.trainer.request_stop("the test")


def logged(run):
    return [(r["step"], r["loss"], r["loss_mean"]) for r in run.metrics if "loss" in r]


def test_the_mean_is_of_all_applied_steps_since_the_last_line_also_after_resuming(tmp_path, corpus):
    run, watch = Run(tmp_path, corpus, "whole"), Watch()
    Trainer(run.config, overrides=SETTINGS, callbacks=watch).fit()
    assert [step for step, *_ in logged(run)] == [5, 15, 17], "step 10 was left out"
    assert {tokens for _, tokens, _ in watch.seen.values()} == {64, 128}
    before = 0
    for step, loss, mean in logged(run):
        of = [watch.seen[i] for i in range(before + 1, step + 1) if watch.seen[i][2]]
        total = sum(tokens for _, tokens, _ in of)
        assert mean == pytest.approx(math.fsum(x * n for x, n, _ in of) / total, rel=1e-12)
        assert loss == watch.seen[step][0]
        before = step

    stopped = Run(tmp_path, corpus, "stopped")
    for stop in (2, 4, 8, 10, 13, None):
        Trainer(stopped.config, overrides=SETTINGS, callbacks=Watch(stop)).fit()
    assert logged(stopped) == logged(run)


def test_of_one_step_it_is_its_loss_and_the_screen_says_it_once(tmp_path, corpus):
    run, other = (Run(tmp_path, corpus, name) for name in ("one", "three"))
    settings = ("sample.tokens=0", "validation.every=0", "train.steps=6")
    Trainer(run.config, overrides=settings).fit()
    Trainer(other.config, overrides=[*settings, "logging.every=3"]).fit()
    losses = {step: loss for step, loss, _ in logged(run)}
    assert all(loss == mean for _, loss, mean in logged(run))
    (_, third, mean), (_, sixth, _) = logged(other)
    assert (third, sixth) == (losses[3], losses[6]), "the same bits"
    assert mean == pytest.approx(sum(losses[i] for i in (1, 2, 3)) / 3, rel=1e-12)
    text, alone = ((r.directory / "log.txt").read_text() for r in (other, run))
    assert f"step 3/6  loss {third:.4f} (mean {mean:.4f})  lr" in text
    assert "(mean" not in alone


def test_the_curve_of_a_run_without_means_is_drawn(tmp_path):
    directory = RunDirectory(tmp_path)
    directory.write_metrics([{"step": i, "tokens": i, "loss": 3.0 - i} for i in (1, 2)])
    path = plot_loss_curve(directory, "earlier", 3.0)
    assert path is not None and path.stat().st_size > 5000


def test_the_speed_of_a_run_is_of_all_its_steps():
    speeds = [(100, 10.0), (200, 50.0), (250, None), (400, 100.0)]
    rows = [{"tokens": n, "tokens_per_second": s} for n, s in speeds]
    assert overall_speed(rows) == pytest.approx(400 / (100 / 10 + 100 / 50 + 200 / 100))
    assert overall_speed([]) is None
    assert overall_speed([{"tokens": 5}]) is None
