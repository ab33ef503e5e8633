"""Runs whose rows carry states: resumed bit for bit at every step, or refused."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from typing import Any

import pytest

from pretrain.checkpoint_folders import checkpoint_name
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import SpikeConfig, load_run_config
from pretrain.config.phases import PhaseConfig, PhaseData
from pretrain.data.batches import open_data
from pretrain.model.spec import with_sizes
from pretrain.run_directory import RunDirectory
from pretrain.training.callbacks import Callback
from pretrain.training.phases import history_of, windows_of
from pretrain.training.resuming import checkpoint_to_resume, past_of
from pretrain.training.setup import vocabulary_of
from pretrain.training.spikes import roll_back
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run, whole_lines

pytestmark = pytest.mark.usefixtures("no_groups")
MIXERS = "{gdn: {num_heads: 2, head_dim: 4, chunk_size: 8}, swa: {num_heads: 4, window: 40}}"
CARRIED = (
    *QUICK,
    "model.pattern=gdn swa slstm",
    f"model.mixers={MIXERS}",
    "train.carry_state=true",
    "train.carry_steps=3",
    "train.carry_state_noise=0.1",
    "checkpoint.every=1",
    "checkpoint.keep_last=9",
)
STEPS = 5


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    run = Run(tmp_path_factory.mktemp("carried"), corpus, "whole", steps=STEPS)
    assert Trainer(run.config, overrides=CARRIED).fit().status == "completed"
    return run


@pytest.mark.parametrize("step", range(1, STEPS))
def test_a_run_resumed_at_any_step_is_bit_for_bit_the_uninterrupted_one(
    whole, tmp_path, corpus, step
):
    parts = Run(tmp_path, corpus, "parts", steps=STEPS)
    saved, copied = (
        RunDirectory(run.directory).checkpoints / checkpoint_name(step) for run in (whole, parts)
    )
    shutil.copytree(saved, copied)
    Trainer(parts.config, overrides=CARRIED).fit()
    expected, found = ([x for x in run.losses if x["step"] > step] for run in (whole, parts))
    assert expected
    assert found == expected


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(whole, tmp_path, corpus):
    run = Run(tmp_path, corpus, "killed", steps=STEPS)
    process = run.start(*CARRIED)
    run.wait_until(process, lambda: sum("loss" in row for row in whole_lines(run)) >= 2)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    status, output = run.finish(*CARRIED)
    assert status == 0, output
    assert run.losses == whole.losses


def in_phases(run, other):
    """Settings of a run with other lengths, then other text, then other batches."""
    config = load_run_config(run.config, CARRIED)
    config.train.steps, config.train.tokens = None, 128 * 9
    config.train.carry_steps, config.checkpoint.keep_last = 2, 20
    config.phases = [
        PhaseConfig(until=0.3, seq_len=16, micro_batch_size=4),
        PhaseConfig(until=0.6, data=PhaseData(path=str(other))),
        PhaseConfig(until=0.8, micro_batch_size=1),
        PhaseConfig(global_batch_tokens=64),
    ]
    return config


@pytest.fixture(scope="module")
def phased(tmp_path_factory, corpus, other_corpus):
    """A finished run in phases, and after which steps rows carry something."""
    run = Run(tmp_path_factory.mktemp("carried"), corpus, "phased")
    watching = Watching(None)
    assert Trainer(in_phases(run, other_corpus), callbacks=watching).fit().status == "completed"
    return run, watching


def test_where_a_phase_has_other_rows_they_are_dealt_anew_and_begin_without_states(phased):
    run, watching = phased
    log = RunDirectory(run.directory).log_file.read_text()
    dealt = [line.split(":")[-2].split()[-1] for line in log.splitlines() if "dealt anew" in line]
    assert dealt == ["3", "6", "8"]
    assert [watching.rows[step] for step in range(1, 11)] == [8] * 3 + [4] * 5 + [2] * 2
    assert all(watching.carried.values())
    assert watching.begun == {0: False, 3: False, 6: False, 8: False}


@pytest.mark.parametrize(
    "steps", [[3, 8], pytest.param([1, 2, 4, 5, 6, 7, 9], marks=pytest.mark.slow)]
)
def test_a_run_in_phases_is_resumed_bit_for_bit_at_borders_and_elsewhere(
    phased, tmp_path, corpus, other_corpus, steps
):
    whole, _ = phased
    for step in steps:
        parts = Run(tmp_path, corpus, f"from-{step}")
        saved, copied = (
            RunDirectory(run.directory).checkpoints / checkpoint_name(step)
            for run in (whole, parts)
        )
        shutil.copytree(saved, copied)
        Trainer(in_phases(parts, other_corpus)).fit()
        expected, found = ([x for x in run.losses if x["step"] > step] for run in (whole, parts))
        assert len(expected) >= 10 - step
        assert found == expected, step


def test_windows_that_later_phases_cannot_read_on_in_are_refused(phased, tmp_path, corpus):
    whole, _ = phased
    parts = Run(tmp_path, corpus, "parts")
    saved, copied = (
        RunDirectory(run.directory).checkpoints / checkpoint_name(3) for run in (whole, parts)
    )
    shutil.copytree(saved, copied)
    config = in_phases(parts, corpus)
    config.phases[1].seq_len = 64
    config.phases[1].micro_batch_size = 1
    with pytest.raises(UserError, match="read on in windows of 32 tokens, but a later phase has"):
        Trainer(config).fit()


class Watching(Callback):
    """Does something behind a step, and keeps whether rows then carry anything."""

    def __init__(self, step, action=None, *, skips=False):
        self.step, self.action, self.skips = step, action, skips
        self.carried, self.rows, self.begun = {}, {}, {}

    def skip_update(self, loss):
        return self.skips and self.trainer.state.step + 1 == self.step

    def before_step(self):
        step = self.trainer.state.step
        if step == self.trainer.plan.phase_at(step).first:
            self.begun[step] = self._carries()

    def between_steps(self):
        if self.trainer.state.step == self.step and self.action is not None:
            self.action(self.trainer)
        states = self.trainer.engine.carried_state()
        self.rows[self.trainer.state.step] = next(iter(states.values())).full_shape[1]
        self.carried[self.trainer.state.step] = self._carries()

    def _carries(self):
        states = self.trainer.engine.carried_state()
        values = [boxes.parts for name, boxes in states.items() if name.endswith("recurrent")]
        return any(bool(values.any()) for parts in values for values in parts.values())


def watched(tmp_path, corpus, *arguments, **options):
    run = Run(tmp_path, corpus, "watched", steps=STEPS)
    watching = Watching(*arguments, **options)
    Trainer(run.config, overrides=CARRIED, callbacks=watching).fit()
    return run, watching.carried


def loss_of(run, step):
    return next(row["loss"] for row in run.losses if row["step"] == step and "loss" in row)


def test_what_is_carried_is_seen_by_the_next_step(whole, tmp_path, corpus):
    run, carried = watched(tmp_path, corpus, 3, lambda trainer: trainer.engine.forget_carried())
    assert carried == {1: True, 2: True, 3: False, 4: True, 5: True}
    assert loss_of(run, 3) == loss_of(whole, 3)
    assert loss_of(run, 4) != loss_of(whole, 4)


def test_after_a_step_that_is_skipped_rows_begin_again(tmp_path, corpus):
    _, carried = watched(tmp_path, corpus, 2, skips=True)
    assert carried == {1: True, 2: False, 3: True, 4: True, 5: True}


def test_after_a_rollback_rows_begin_again(tmp_path, corpus):
    def back(trainer):
        trainer.writer.wait()
        spikes = SpikeConfig(policy="rollback", rollback_steps=2)
        train = dataclasses.replace(trainer.config.train, spikes=spikes)
        config = dataclasses.replace(trainer.config, train=train)
        directory = trainer.writer.directory
        found = roll_back(config, trainer.engine, directory, trainer.state)
        assert found is not None
        assert found.name == "step-00000001"
        trainer.stop.request("the test")

    _, carried = watched(tmp_path, corpus, 4, back)
    assert carried == {1: False, 2: True, 3: True}


def test_a_rollback_over_the_border_of_a_phase_deals_rows_anew(tmp_path, corpus, other_corpus):
    run = Run(tmp_path, corpus, "rolled")
    gone_back: list[Any] = []

    def back(trainer):
        if gone_back:
            trainer.stop.request("the test")
            return
        trainer.writer.wait()
        trainer.config.train.spikes = SpikeConfig(rollback_steps=2)
        gone_back.append(
            roll_back(trainer.config, trainer.engine, trainer.writer.directory, trainer.state)
        )

    Trainer(in_phases(run, other_corpus), callbacks=Watching(5, back)).fit()
    assert [found.name for found in gone_back] == ["step-00000002"]
    log = RunDirectory(run.directory).log_file.read_text()
    dealt = [line.split(":")[-2].split()[-1] for line in log.splitlines() if "dealt anew" in line]
    assert dealt == ["3", "2", "3"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.segment_tokens=16"], "train.segment_tokens 16, expected null: .* as a whole"),
        (
            ["train.batch_warmup_steps=2", "train.batch_warmup_start=64"],
            "train.batch_warmup_steps 2, expected 0: carried states need the same rows",
        ),
        (
            ["model.recursion={sampling: poisson, adapter: true}"],
            "model.recursion.sampling poisson, expected fixed: carried states need a state",
        ),
        (
            ["model.recursion={step_signal: coordinate, position_offsets: 3}"],
            "position_offsets 3, expected 0: carried states need positions that go on",
        ),
        (["parallel.tensor=2"], "true and carry_state_noise set with parallel.tensor 2, expected"),
        (["train.carry_state=false"], "carry_state_noise is 0.1 without train.carry_state"),
        (["train.carry_steps=0"], "train.carry_steps is 0, expected at least 1"),
        (["train.carry_state_noise=-1"], "train.carry_state_noise is -1.0, expected at least 0"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(run.config, overrides=[*CARRIED, *overrides])


@pytest.mark.parametrize("pattern", ["gdn attn", "rat gdn"])
def test_states_that_grow_are_refused(run, pattern):
    grows = "attn" if "attn" in pattern else "rat"
    overrides = [*CARRIED, f"model.pattern={pattern}", "model.mixers={}"]
    with pytest.raises(ConfigError, match=f"state of mixer '{grows}' grows .* such as swa"):
        Trainer(run.config, overrides=overrides).fit()


def test_attention_with_a_window_is_not_refused(run):
    mixers = "model.mixers={attn: {num_heads: 4, window: 8}}"
    overrides = [*CARRIED, "model.pattern=attn", mixers, "train.steps=2"]
    assert Trainer(run.config, overrides=overrides).fit().status == "completed"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.carry_state=false", "train.carry_state_noise=0"], r"carry_steps \(True, 3\), the"),
        (["train.carry_steps=2"], r"trained with train.carry_state, carry_steps \(True, 3\), the"),
        (
            ["parallel.tensor=2", "train.carry_state_noise=0"],
            "are those of parallel.tensor 1, the config says 2; expected the same to resume",
        ),
    ],
)
def test_a_checkpoint_that_cannot_be_continued_is_refused(whole, overrides, message):
    config = load_run_config(whole.config, [*CARRIED, *overrides])
    config.model = with_sizes(config.model, "test")
    data = open_data(config.data)
    history = history_of(config.plan, [data], windows_of(config.plan, past_of(config)))
    with pytest.raises(UserError, match=message):
        checkpoint_to_resume(config, data, history, vocabulary_of(config, data, "test"))
