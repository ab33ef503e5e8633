"""What a resumed run says of settings that changed, and what it refuses."""

from __future__ import annotations

import pytest

from pretrain.common.errors import UserError
from pretrain.config import learning_rate
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")


def fit(run, *overrides, force=False):
    return Trainer(run.config, overrides=[*QUICK, *overrides], force=force).fit()


def said(run):
    return RunDirectory(run.directory).log_file.read_text()


def test_each_setting_that_changed_is_said_once(run):
    fit(run, "train.steps=2")
    fit(run, "optimizer.lr=5e-3", "optimizer.betas=[0.8,0.9]", "validation.tokens=64")
    found = said(run).split("settings that have changed since then:\n")
    assert len(found) == 2
    lines = found[1].split("\n2")[0].splitlines()
    assert lines == [
        "  optimizer.betas: [0.9, 0.95] -> [0.8, 0.9]",
        "  optimizer.lr: 0.01 -> 0.005",
        "  train.steps: 2 -> 4",
        "  validation.tokens: 128 -> 64",
    ]
    # What changes nothing is not said, and neither is what was said when it was saved.
    fit(
        run,
        "optimizer.lr=5e-3",
        "optimizer.betas=[0.8,0.9]",
        "validation.tokens=64",
        "checkpoint.resume=step-00000004",
    )
    assert said(run).count("settings that have changed") == 1


WSD = ("schedule.kind=wsd", "schedule.decay_fraction=0.5")


@pytest.mark.parametrize(
    ("before", "changes", "rises"),
    [
        # Extensions: past an anneal, of what does not anneal, and within the flat part.
        (("schedule.kind=cosine",), ("train.steps=8",), True),
        (("schedule.kind=linear",), ("train.steps=8",), True),
        (WSD, ("train.steps=8",), True),
        (("schedule.kind=constant",), ("train.steps=8",), False),
        ((*WSD, "train.steps=8"), ("train.steps=12", "checkpoint.resume=step-00000004"), False),
        ((*WSD, "train.steps=8"), ("train.steps=12", "checkpoint.resume=step-00000006"), True),
        # The rise comes later: another warm-up comes first.
        (("schedule.kind=cosine",), ("train.steps=40", "schedule.warmup_steps=20"), True),
        ((*WSD, "train.steps=8"), ("train.steps=40", "schedule.warmup_steps=20"), True),
        # Another schedule or learning rate.
        (("schedule.kind=linear",), ("schedule.kind=constant", "train.steps=6"), True),
        (("schedule.kind=constant",), ("schedule.kind=cosine", "train.steps=6"), False),
        (("schedule.kind=constant",), ("optimizer.lr=2e-2", "train.steps=6"), True),
        (("schedule.kind=constant",), ("optimizer.lr=1e-3", "train.steps=6"), False),
        # The warm-up was planned.
        (("schedule.warmup_steps=4",), ("schedule.warmup_steps=4", "train.steps=6"), False),
        (("schedule.warmup_steps=4",), ("schedule.warmup_steps=6", "train.steps=8"), False),
        (
            ("schedule.warmup_steps=8", "train.steps=8"),
            ("train.steps=8", "schedule.warmup_steps=4", "checkpoint.resume=step-00000002"),
            True,
        ),
        # A shorter run has no step left.
        (("schedule.kind=cosine",), ("optimizer.lr=1", "train.steps=3"), False),
    ],
)
def test_a_learning_rate_that_rises_without_being_planned_asks_for_force(
    run, before, changes, rises
):
    fit(run, "checkpoint.keep_last=5", *before)
    steps = RunDirectory(run.directory).read_metrics()[-1]["step"]
    if not rises:
        assert fit(run, *before, *changes).status == "completed"
        return
    with pytest.raises(UserError, match=r"the learning rate would rise to .* with --force"):
        fit(run, *before, *changes)
    assert RunDirectory(run.directory).read_metrics()[-1]["step"] == steps, "nothing has begun"
    assert fit(run, *before, *changes, force=True).status == "completed"
    assert "  learning rate: " in said(run)


def test_the_branch_that_is_offered_works(run):
    """From before the decay where such a checkpoint is kept, else from the weights."""
    fit(run, *WSD, "checkpoint.keep_last=5", "train.steps=8")
    with pytest.raises(UserError, match=r"checkpoint.resume=step-00000004, from before the decay"):
        fit(run, *WSD, "train.steps=16")
    assert "train.steps=16 with checkpoint.resume=step-00000004, from before the d" in said(run)
    fit(run, *WSD, "train.steps=16", "checkpoint.resume=step-00000004")
    settings = Trainer(run.config, overrides=[*WSD, "train.steps=16"]).config
    for row in run.metrics:
        if "lr" in row:
            expected = learning_rate(settings.schedule, 1e-2, row["step"] - 1, 16)
            assert row["lr"] == pytest.approx(expected)


def test_a_new_run_from_the_weights_is_offered_where_no_checkpoint_is_left(run, tmp_path, corpus):
    fit(run, *WSD, "checkpoint.keep_last=1")
    with pytest.raises(UserError, match=r"name=NEW initialize.checkpoint=(\S+), a") as error:
        fit(run, *WSD, "train.steps=8")
    checkpoint = str(error.value).split("initialize.checkpoint=")[1].split(",")[0]
    other = Run(tmp_path, corpus, "other", steps=4)
    assert fit(other, *WSD, f"initialize.checkpoint={checkpoint}").status == "completed"
