"""Which settings may change when a run is launched again."""

from __future__ import annotations

import dataclasses

import pytest

from launch import members
from launch.grid import Member
from launch.members import CHANGEABLE, DONE, STOPPED, check_same_settings, member_state
from pretrain.common.config_loader import ConfigError, flattened
from pretrain.config import ModelConfig, RunConfig, TrainConfig
from pretrain.run_directory import RunDirectory

# What a run learns, and from what: another one needs another name.
LEARNED = (
    *(
        "model.",
        "data.path",
        "data.blend",
        "data.packing",
        "data.prefix",
        "data.window",
        "optimizer.",
        "schedule.",
        "seed",
        "initialize",
        "distill",
        "train.freeze",
    ),
    *("train.seq_len", "train.global_batch_tokens", "train.batch_warmup_", "train.precision"),
    *("train.carry_", "branch"),
)


def config_of(folder):
    return RunConfig(
        "r",
        ModelConfig(pattern="attn", hidden_size=16, vocab_size=64),
        train=TrainConfig(steps=4, seq_len=32, global_batch_tokens=64),
        directory=str(folder),
    )


def test_every_setting_may_change_or_says_what_is_learned(tmp_path):
    """A new setting is on neither side until someone has thought about it."""
    for key in flattened(dataclasses.asdict(config_of(tmp_path))):
        assert key.startswith(LEARNED) != key.startswith(CHANGEABLE), key


@pytest.mark.parametrize(
    ("section", "name", "value", "same"),
    [
        ("eval", "limit", 3, True),
        ("eval", "tasks", ["hellaswag"], True),
        ("validation", "tokens", 64, True),
        ("train", "nonfinite", "skip", True),
        ("train", "steps", 8, True),
        ("train", "seq_len", 16, False),
        ("optimizer", "lr", 0.5, False),
        ("schedule", "warmup_steps", 1, False),
        ("data", "path", "elsewhere", False),
    ],
)
def test_a_run_is_recognised(tmp_path, section, name, value, same):
    RunDirectory(tmp_path).write_config(config_of(tmp_path))
    changed = config_of(tmp_path)
    setattr(getattr(changed, section), name, value)
    if same:
        check_same_settings(Member("", {}, changed))
        return
    with pytest.raises(ConfigError, match=f"{section}.{name} is .* there and {value} here"):
        check_same_settings(Member("", {}, changed))


@pytest.mark.parametrize(
    ("rows", "status", "state"),
    [
        ([{"step": 4, "valid_loss": 3.0}], None, DONE),
        ([{"step": 4, "valid_loss": None}], None, DONE),  # it was not finite
        ([{"step": 2, "valid_loss": 3.0}], None, STOPPED),
        ([{"step": 2, "valid_loss": 3.0}], 75, STOPPED),
        ([{"step": 2, "valid_loss": 3.0}], 0, DONE),  # such as of a budget that was lowered
        ([{"step": 4, "loss": 3.0}], 75, STOPPED),
        ([{"step": 4, "loss": 3.0}], None, DONE),  # there is no text to validate on
    ],
)
def test_a_run_is_done_when_what_is_due_after_its_last_step_is(
    tmp_path, monkeypatch, rows, status, state
):
    monkeypatch.setattr(members, "_steps_saved", lambda directory: 4)
    directory = RunDirectory(tmp_path)
    directory.write_metrics([{"tokens": 1, **row} for row in rows])
    directory.write_launch(status=status)
    assert member_state(Member("", {}, config_of(tmp_path))).state == state
