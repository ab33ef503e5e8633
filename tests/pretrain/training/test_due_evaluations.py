"""An evaluation that was due and was cut off has its result after the next start."""

from __future__ import annotations

import pytest

from launch.grid import Member
from launch.members import DONE, STOPPED, member_state
from pretrain.training.callbacks import Callback
from pretrain.training.callbacks.validate import Validate
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")
EVAL = ("eval.tasks=[text_parity@4,text_mqar@2]", "eval.every=2", "eval.limit=3")


class StopAfter(Callback):
    """A signal within a step."""

    def __init__(self, step):
        self.step = step

    def after_step(self, result):
        if self.trainer.state.step == self.step:
            self.trainer.request_stop("a user")


class Killed(BaseException):
    pass


def names(run, prefix):
    """(step, name) of what was measured, in order."""
    return [(row["step"], k) for row in run.metrics for k in row if k.startswith(prefix)]


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_a_signal_within_any_step_loses_no_validation(run, tmp_path, corpus, step):
    whole = Run(tmp_path, corpus, "whole", steps=4)
    Trainer(whole.config, overrides=QUICK).fit()
    stopped = Trainer(run.config, overrides=QUICK, callbacks=[StopAfter(step)]).fit()
    assert (stopped.status, stopped.exit_status, stopped.step) == ("stopped", 75, step)
    assert not run.directory.joinpath("plots").exists()
    member = Member("", {}, stopped_config(run))
    assert member_state(member).state == STOPPED
    done = Trainer(run.config, overrides=QUICK).fit()
    assert (done.status, done.exit_status, done.step) == ("completed", 0, 4)
    assert run.losses == whole.losses
    assert run.directory.joinpath("plots/loss.png").exists()
    assert member_state(member).state == DONE


def stopped_config(run):
    return Trainer(run.config, overrides=QUICK).config


@pytest.mark.parametrize("step", [2, 4])
def test_a_kill_within_a_validation_after_the_save_loses_nothing(
    run, tmp_path, corpus, monkeypatch, step
):
    """It comes before the save, unless a signal at the same step has put it off."""
    whole = Run(tmp_path, corpus, "whole", steps=4)
    Trainer(whole.config, overrides=QUICK).fit()
    Trainer(run.config, overrides=QUICK, callbacks=[StopAfter(step)]).fit()

    def killed(self):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Validate, "_validate", killed)
        with pytest.raises(Killed):
            Trainer(run.config, overrides=QUICK).fit()
    assert Trainer(run.config, overrides=QUICK).fit().status == "completed"
    assert run.losses == whole.losses


@pytest.mark.slow
@pytest.mark.parametrize("step", [2, 3, 4])
@pytest.mark.parametrize("how", ["signal", "kill", "kill after the first task"])
def test_no_evaluation_of_tasks_is_lost(run, monkeypatch, step, how):
    in_loop = pytest.importorskip("evals.harness.in_loop")
    pytest.importorskip("lm_eval")
    overrides = (*QUICK, *EVAL)
    if how == "signal":
        result = Trainer(run.config, overrides=overrides, callbacks=[StopAfter(step)]).fit()
        assert result.status == "stopped"
    else:
        evaluate = in_loop.InLoopEvaluation._evaluate

        def killed(self, tasks):
            if self.trainer.state.step == max(step // 2 * 2, 2):
                self.trainer.writer.wait()
                if how != "kill":
                    evaluate(self, dict([next(iter(tasks.items()))]))
                raise Killed
            evaluate(self, tasks)

        with monkeypatch.context() as patched:
            patched.setattr(in_loop.InLoopEvaluation, "_evaluate", killed)
            with pytest.raises(Killed):
                Trainer(run.config, overrides=overrides).fit()
    assert Trainer(run.config, overrides=overrides).fit().status == "completed"
    expected = {
        (s, f"eval/{n}") for s in (2, 4) for n in ("text_parity@4/acc", "text_mqar@2/contains")
    }
    found = names(run, "eval/")
    assert len(found) == len(set(found))
    assert set(found) == expected
    before = run.metrics
    assert Trainer(run.config, overrides=overrides).fit().status == "completed"
    assert run.metrics == before, "nothing is evaluated twice"


@pytest.mark.slow
def test_a_task_added_to_a_run_that_is_complete_is_evaluated(run):
    pytest.importorskip("lm_eval")
    Trainer(run.config, overrides=QUICK).fit()
    Trainer(run.config, overrides=(*QUICK, *EVAL)).fit()
    assert {step for step, _ in names(run, "eval/")} == {4}
