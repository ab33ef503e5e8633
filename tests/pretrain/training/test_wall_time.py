"""What a run's time is spent on, which rank keeps the others waiting, and profiles of steps."""

from __future__ import annotations

import json
import time

import pytest
import torch
from torch import nn

from pretrain.common.errors import ConfigError
from pretrain.data.batches import TrainingBatches
from pretrain.training.callbacks import Callback
from pretrain.training.callbacks.profiler import memory_over_time
from pretrain.training.rank_times import ForwardClock, RankTime, slowest_rank
from pretrain.training.trainer import Trainer
from pretrain.training.wall_time import WallTime
from tests.helpers.processes import run
from tests.helpers.training_run import Run

OVERRIDES = ("sample.tokens=0", "logging.every=1", "validation.every=2", "checkpoint.every=2")
KINDS = ("start", "data", "train", "wait", "save", "evaluate", "lost", "other")
NOTHING = dict.fromkeys(KINDS, 0)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_seconds_add_up_whatever_is_within_what(clock):
    spent = WallTime(99.0)
    clock[0] = 102.0
    spent.switch("other")
    clock[0] = 103.0
    with spent.spent_on("evaluate"):
        clock[0] = 107.0
        with spent.spent_on("save"):
            clock[0] = 112.0
        clock[0] = 118.0
    clock[0] = 125.0
    seconds = spent.seconds()
    assert seconds == {**NOTHING, "start": 3, "save": 5, "evaluate": 10, "other": 8}
    assert sum(seconds.values()) == 26


def test_steps_that_were_rolled_back_are_lost(clock):
    spent = WallTime(100.0)
    for _ in range(5):
        with spent.spent_on("train"):
            clock[0] += 2
        spent.count_step()
        clock[0] += 1
    assert spent.metrics()["time_to_first_step"] == 2
    spent.undo_steps(3)
    assert spent.seconds() == {**NOTHING, "start": 5, "train": 4, "lost": 6}
    assert spent.metrics()["goodput"] == pytest.approx(4 / 15)
    spent.undo_steps(9)  # more than this start has done
    assert spent.seconds()["lost"] == 10
    assert spent.describe() == (
        "15.0 s: steps rolled back 66.7%, starting 33.3%; first step after 2.0 s"
    )


@pytest.mark.usefixtures("no_groups")
def test_the_parts_of_a_run_add_up_to_its_time(run, monkeypatch):
    """Each is as long as what sleeps in it, at least, and no longer than that and the rest."""
    load = TrainingBatches.micro_batches

    def late(*arguments, **options):
        time.sleep(0.2)
        return load(*arguments, **options)

    monkeypatch.setattr(
        TrainingBatches,
        "micro_batches",
        late,
    )

    class Idle(Callback):
        def between_steps(self):
            time.sleep(0.3)

    start = time.monotonic()
    Trainer(run.config, overrides=(*OVERRIDES, "train.steps=3"), callbacks=[Idle()]).fit()
    took = time.monotonic() - start
    rows = [row for row in run.metrics if "loss" in row]
    for row in rows:
        parts = {kind: row[f"time/{kind}"] for kind in KINDS}
        assert sum(parts.values()) == pytest.approx(row["seconds"], rel=0.02)
        assert row["goodput"] == pytest.approx(parts["train"] / sum(parts.values()), rel=0.02)
    last = rows[-1]
    assert last["seconds"] <= took
    assert last["time/other"] >= 0.6 and last["time/data"] >= 0.2  # read ahead hides the others
    assert last["time/evaluate"] > 0 and last["time/save"] > 0 and last["time/lost"] == 0
    assert rows[0]["time_to_first_step"] == last["time_to_first_step"]
    assert last["time_to_first_step"] <= rows[0]["seconds"] + 5e-4  # which are rounded
    assert "wall time" in (run.directory / "log.txt").read_text()


def busy(rank, forward=1.0, stage=0, data=0.1, other=0.1):
    return RankTime(rank, f"host{rank}", stage, forward, data, other)


def test_the_slowest_rank_is_compared_with_those_of_its_stage():
    assert slowest_rank([busy(0), busy(1, stage=1)], 2.0) is None
    even = slowest_rank([busy(0), busy(1), busy(2, forward=1.05)], 2.0)
    assert even is not None and even.rank == 2 and even.sentence is None
    found = slowest_rank([busy(0), busy(1), busy(2, forward=3.0), busy(3, 9.0, stage=1)], 4.0)
    assert found is not None and found.rank == 2
    assert found.ratio == pytest.approx(3.2 / 1.2)
    assert found.sentence == (
        "rank 2 on host2 is slow: busy for 3.2 s a step where the others are for 1.2 s (2.7 "
        "times), mostly in its forward passes"
    )
    for where, words in (("data", "waiting for its data"), ("other", "does between steps")):
        found = slowest_rank([busy(0), busy(1, **{where: 5.0})], 6.0)
        assert found is not None and found.sentence is not None and words in found.sentence
    # Many times as long, but nothing against a step.
    tiny = slowest_rank([busy(0, 1e-4, 0, 0, 0), busy(1, 1e-3, 0, 0, 0)], 1.0)
    assert tiny is not None and tiny.ratio == pytest.approx(10) and tiny.sentence is None


def test_forward_passes_in_training_are_timed_alone():
    class Slow(nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            if x.sum() < 0:
                raise ValueError
            return x

    module = Slow()
    forward = ForwardClock([module])
    module(torch.ones(1))
    module(torch.ones(1))
    time.sleep(0.05)
    assert 0.1 <= forward.take() < 0.15
    with pytest.raises(ValueError):
        module(-torch.ones(1))
    assert 0.05 <= forward.take() < 0.1
    module.eval()(torch.ones(1))
    assert forward.take() == 0
    forward.close()
    module.train()(torch.ones(1))
    assert forward.take() == 0


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "data", "other"])
def test_a_slowed_rank_is_named(tmp_path, corpus, where):
    job = Run(tmp_path, corpus, "slowed", steps=6)
    done = run(
        "torch.distributed.run",
        *("--nproc-per-node=2", "--standalone", "-m", "tests.helpers.slowed_run", where),
        *(job.config, *OVERRIDES, "logging.every=3"),
    )
    assert done.returncode == 0, done.stderr
    words = {
        "forward": "its forward passes",
        "data": "waiting for its data",
        "other": "what it does between steps",
    }
    log = (job.directory / "log.txt").read_text()
    assert "is slow: busy for" in log and f"mostly in {words[where]}" in log
    assert "warning: step" in log and "rank 1 on" in log
    last = [row for row in job.metrics if "loss" in row][-1]
    assert last["slowest_rank"] == 1 and last["slowest_rank_ratio"] > 1.25


@pytest.mark.usefixtures("no_groups")
def test_steps_are_profiled_by_a_setting(run):
    Trainer(run.config, overrides=(*OVERRIDES, "profile.steps=[2, 3]")).fit()
    folder = run.directory / "profiles"
    assert sorted(p.name for p in folder.iterdir()) == [
        "steps-2-3-rank-0-memory.png",
        "steps-2-3-rank-0.json",
    ]
    assert json.loads((folder / "steps-2-3-rank-0.json").read_text())["traceEvents"]
    curves = memory_over_time(folder / "steps-2-3-rank-0.json")
    seconds, sizes = curves["CPU"]
    assert seconds == sorted(seconds) and seconds[0] == 0 and len(sizes) > 100
    assert max(sizes) > min(sizes) >= 0


@pytest.mark.parametrize("steps", ["[3]", "[3, 2]", "[1, 2, 3]", "[0, 2]"])
def test_steps_that_cannot_be_profiled_are_refused(run, steps):
    with pytest.raises(ConfigError, match=r"profile\.steps"):
        Trainer(run.config, overrides=[f"profile.steps={steps}"])
