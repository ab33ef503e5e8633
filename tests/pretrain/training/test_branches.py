"""Branches: runs that go on from a step of another one, and the checkpoints kept for them."""

from __future__ import annotations

import hashlib

import pytest
import torch.distributed as dist

from pretrain import Callback
from pretrain.checkpoint_folders import checkpoint_step, list_checkpoints
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.config import learning_rate, load_run_config
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")
CONSTANT = "schedule.kind=constant"


def fit(run, *overrides, force=False):
    return Trainer(run.config, overrides=[*QUICK, CONSTANT, *overrides], force=force).fit()


def content(folder):
    """Every file below a folder with its hash and the time of its last change."""
    return {
        path: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def saved(run):
    return sorted(map(checkpoint_step, list_checkpoints(RunDirectory(run.directory).checkpoints)))


@pytest.fixture(scope="module")
def trunk(tmp_path_factory, corpus):
    """Six steps at a constant rate, with averaged weights; a line of the log every third step."""
    had_groups = dist.is_initialized()
    stop_processes()
    trunk = Run(tmp_path_factory.mktemp("trunk"), corpus, "run", steps=6)
    fit(trunk, "checkpoint.keep_last=9", "optimizer.ema_decay=0.9", "logging.every=3")
    if had_groups:
        start_processes()
    return trunk


def other(trunk, tmp_path, corpus, name="branch", steps=6):
    return Run(tmp_path, corpus, name, steps=steps), f"branch.run={trunk.directory}"


def test_a_branch_that_changes_nothing_is_the_trunk_going_on(trunk, tmp_path, corpus):
    before = content(trunk.directory)
    branch, run = other(trunk, tmp_path, corpus)
    same = ("optimizer.ema_decay=0.9", "logging.every=3", "checkpoint.keep_last=9")
    fit(branch, run, "branch.tokens=512", *same)  # four steps of 128 tokens, between two lines
    assert content(trunk.directory) == before, "the trunk is only read"
    assert branch.losses == [row for row in trunk.losses if row["step"] >= 4]
    ends = [r.directory / "checkpoints/step-00000006" for r in (trunk, branch)]
    tensors = [sorted(end.glob("__*")) for end in ends]
    assert tensors[0] and [p.name for p in tensors[0]] == [p.name for p in tensors[1]]
    for one, two in zip(*tensors, strict=True):
        assert one.read_bytes() == two.read_bytes(), "weights, moments and averages"

    parent = RunDirectory(branch.directory).read_parent()
    assert (parent["run"], parent["step"], parent["tokens"]) == (str(trunk.directory), 4, 512)
    said = RunDirectory(branch.directory).log_file.read_text()
    assert f"branch of {trunk.directory}, step 4 (512 tokens)" in said
    assert "settings that have changed" not in said


def test_a_branch_is_resumed_from_its_own_checkpoints(trunk, tmp_path, corpus):
    whole, run = other(trunk, tmp_path, corpus, "whole", steps=10)
    decay = (run, "branch.step=2", "schedule.kind=wsd", "checkpoint.every=3")
    fit(whole, *decay)
    stopped, _ = other(trunk, tmp_path, corpus, "stopped", steps=10)

    class StopAtFour(Callback):
        def before_step(self):
            if self.trainer.state.step == 4:
                self.trainer.request_stop("test")

    overrides = [*QUICK, CONSTANT, *decay]
    result = Trainer(stopped.config, overrides=overrides, callbacks=StopAtFour()).fit()
    assert (result.status, result.step) == ("stopped", 5)
    assert fit(stopped, *decay).status == "completed"
    assert stopped.losses == whole.losses


@pytest.mark.parametrize("kind", ["wsd", "two_stage"])
def test_the_decay_begins_where_the_branch_does(trunk, tmp_path, corpus, kind):
    branch, run = other(trunk, tmp_path, corpus, steps=7)
    fit(branch, run, "branch.step=4", f"schedule.kind={kind}", "schedule.final_ratio=0")
    expected = {"wsd": [1e-2, 1e-2 * 2 / 3, 1e-2 / 3], "two_stage": [0, 0, 0]}[kind]
    rates = [row["lr"] for row in branch.metrics if "lr" in row]
    assert rates == pytest.approx(expected, abs=1e-12)
    # As its own config says, for whoever reads it later.
    config = RunDirectory(branch.directory).read_config()
    assert learning_rate(config.schedule, 1e-2, 3, 7) == 1e-2
    assert [learning_rate(config.schedule, 1e-2, s, 7) for s in (4, 5, 6)] == rates

    planned = load_run_config(
        branch.config,
        [run, "branch.step=4", "branch.decay=planned", "schedule.kind=wsd"],
    )
    assert planned.schedule.decay_fraction == 0.2


def test_what_branches_need_is_saved_and_kept(run):
    kept = ("checkpoint.keep=[129,640]", "checkpoint.every=4", "checkpoint.keep_last=1")
    fit(run, "train.steps=8", *kept)
    assert saved(run) == [2, 5, 8], "rounded up to whole steps of 128 tokens; the last one"


def test_a_step_that_the_trunk_does_not_have_is_named_with_those_that_it_has(
    trunk, tmp_path, corpus
):
    branch, run = other(trunk, tmp_path, corpus, steps=9)
    message = (
        r"branch\.step is 3, of which \S+ has no checkpoint; its checkpoints: "
        r"step 2 \(256 tokens\), step 4 \(512 tokens\), step 6 \(768 tokens\); .* waits"
    )
    with pytest.raises(UserError, match=message):
        fit(branch, run, "branch.step=3")
    with pytest.raises(UserError, match=r"branch\.tokens is 300, step 3, of which"):
        fit(branch, run, "branch.tokens=300")
    with pytest.raises(UserError, match=r"but there is no run at nowhere"):
        fit(branch, "branch.run=nowhere", "branch.step=3")
    assert not (branch.directory / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["branch.step=2", "branch.tokens=256"], r"branch\.step is 2 and branch\.tokens 256, exp"),
        ([], r"branch\.step is None and branch\.tokens None, expected exactly one"),
        (["branch.step=0"], r"branch\.step is 0, expected at least 1"),
        (["branch.step=4"], r"branch\.step is 4, expected less than the whole run has, .* 4 steps"),
        (["branch.tokens=500"], r"branch\.tokens is 500, expected less than .* 512 tokens"),
        (["branch.step=2", "initialize.checkpoint=x"], r"branch and initialize are both set"),
        (["branch.step=2", "branch.decay=there"], r"branch\.decay is 'there' .*, expected one of"),
        (["checkpoint.keep=[0]", "branch=null"], r"checkpoint\.keep is \[0\], expected at least 1"),
        (
            ["checkpoint.keep=[600]", "branch=null"],
            r"checkpoint\.keep has 600, which .* 512 tok",
        ),
        (["branch.step=2", "directory=trunk"], r"branch\.run is trunk, the directory of this run"),
        (
            ["branch.step=1", "schedule.kind=wsd"],
            r"schedule\.warmup_steps is 2, but the decay begins after 1 of the 4 steps",
        ),
    ],
)
def test_bad_settings_are_one_sentence(run, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(run.config, ["branch.run=trunk", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=1", r"trained with seed 0, the config says 1: a branch would repeat or skip data"),
        ("train.seq_len=64", r"train\.seq_len 32, the config says 64: a branch would repeat"),
        ("model.hidden_size=48", r"holds another model: model.hidden_size is 24 there and 48 here"),
        ("optimizer.lr=1", r"the learning rate would rise to 1 after step 2"),
    ],
)
def test_what_a_branch_cannot_change(trunk, tmp_path, corpus, override, message):
    branch, run = other(trunk, tmp_path, corpus)
    with pytest.raises(UserError, match=message):
        fit(branch, run, "branch.step=2", override)
