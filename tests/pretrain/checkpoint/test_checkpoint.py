"""Checkpoints: bit-equal resumption, damage refused by name, nothing half-written in sight."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from pretrain.checkpoint.state import (
    check_files,
    check_same_model,
    load_checkpoint,
    load_weights,
    read_state,
    recover_replaced,
)
from pretrain.checkpoint.writer import save_checkpoint
from pretrain.common.errors import UserError
from pretrain.config import CheckpointConfig, RunConfig
from pretrain.run_directory import find_checkpoint, list_checkpoints
from pretrain.training.engine import Engine
from tests.helpers.small_model import VOCAB, settings
from tests.helpers.small_training import OPTIMIZER, STATE, batches, make

pytestmark = pytest.mark.usefixtures("processes")


def save(directory, engine, step=2, **checkpoint):
    config = RunConfig("test", settings(), checkpoint=CheckpointConfig(**checkpoint))
    return save_checkpoint(directory, engine, config, dataclasses.replace(STATE, step=step))


def trained(dtype=torch.float32):
    engine = Engine(make(dtype), OPTIMIZER)
    for step in range(2):
        engine.train_step(batches(step), 1e-2)
    return engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_goes_on_bit_for_bit(tmp_path, dtype):
    engine = trained(dtype)
    path = save(tmp_path, engine)
    expected = [engine.train_step(batches(step), 1e-2) for step in (2, 3)]
    other = Engine(make(dtype), OPTIMIZER)
    check_files(path)
    load_checkpoint(path, other)
    assert [other.train_step(batches(step), 1e-2) for step in (2, 3)] == expected
    for a, b in zip(engine.parts[0].parameters(), other.parts[0].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_alone(tmp_path, dtype):
    """For evaluation, which is in float32 whatever the training was in."""
    engine = trained(dtype)
    path = save(tmp_path, engine)
    model = make()
    load_weights(path, model)
    for a, b in zip(engine.parts[0].parameters(), model.parameters(), strict=True):
        assert torch.equal(a.float(), b)


def test_old_ones_go_and_milestones_stay(tmp_path):
    engine = trained()
    for step in (2, 4, 6, 8):
        save(tmp_path, engine, step, keep_last=2, milestone_every=4)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000008",
        "step-00000006",
        "step-00000004",
    ]
    assert (tmp_path / "latest").read_text() == "step-00000008"
    assert not list(tmp_path.glob(".writing*"))
    assert read_state(find_checkpoint(tmp_path)).step == 8


def test_folders_and_steps_that_are_not_this_run_s_past_are_left_alone(tmp_path):
    """A copy that someone made, and later steps than the one resumed from."""
    engine = trained()
    for step in (2, 4, 6):
        save(tmp_path, engine, step, keep_last=2)
    (tmp_path / "step-00000004-backup").mkdir()
    save(tmp_path, engine, 5, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "step-00000006",
        "step-00000005",
        "step-00000004",
    ]
    assert find_checkpoint(tmp_path).name == "step-00000005"
    assert (tmp_path / "step-00000004-backup").exists()


def test_settings_of_the_optimizer_are_the_config_s_after_loading(tmp_path):
    path = save(tmp_path, trained())
    engine = Engine(make(), dataclasses.replace(OPTIMIZER, betas=[0.5, 0.6], eps=1e-3))
    load_checkpoint(path, engine)
    engine.train_step(batches(2), 1e-2)
    for group in engine.backend.optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.5, 0.6), 1e-3, 1e-2)


@pytest.mark.parametrize("where", ["state", "model"])
def test_a_checkpoint_of_a_later_version_is_told_by_its_path(tmp_path, where):
    path = save(tmp_path, trained()) / "state.json"
    values = json.loads(path.read_text())
    (values if where == "state" else values["model"])["future"] = 1
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"unknown setting 'future'.*; a later version") as error:
        read_state(path.parent)
    assert str(error.value).startswith(str(path))


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*: Not a directory"):
        save(tmp_path / "file", trained())


def test_saving_a_step_again_replaces_it(tmp_path):
    engine = trained()
    save(tmp_path, engine)
    engine.train_step(batches(5), 1e-2)
    path = save(tmp_path, engine)
    check_files(path)
    model = make()
    load_weights(path, model)
    assert torch.equal(model.embedding.weight, engine.parts[0].embedding.weight)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "no list", "empty list"])
def test_damage_is_refused_by_name_and_the_one_before_is_offered(tmp_path, damage):
    engine = trained()
    save(tmp_path, engine, 2)
    path = save(tmp_path, engine, 4)
    victim = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    if damage == "truncate":
        victim.write_bytes(content[:-100])
        message = rf"{victim.name} has \d+ bytes, expected {len(content)}"
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
        message = f"{victim.name} has changed since it was written"
    elif damage == "remove":
        victim.unlink()
        message = f"{victim.name} is missing"
    elif damage == "empty list":
        (path / "files.json").write_text("{}")
        message = "files.json does not list what a checkpoint is made of"
    else:
        (path / "files.json").write_text("[1]")
        message = "files.json is missing or unreadable"
    with pytest.raises(UserError, match=message) as error:
        check_files(path)
    assert "step-00000004 is damaged" in str(error.value)
    assert "checkpoint.resume=step-00000002" in str(error.value)
    check_files(tmp_path / "step-00000002")


def test_left_overs_of_a_killed_save_are_never_seen(tmp_path):
    engine = trained()
    save(tmp_path, engine, 2)
    half = tmp_path / ".writing-step-00000004-abc"
    half.mkdir()
    (half / "common.pt").write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "step-00000002"
    save(tmp_path, engine, 4)
    assert not half.exists()


def test_a_replacement_cut_off_between_its_renames_is_undone(tmp_path):
    save(tmp_path, trained(), 2)
    (tmp_path / "step-00000002").rename(tmp_path / ".writing-old-step-00000002")
    recover_replaced(tmp_path)
    check_files(find_checkpoint(tmp_path))


def test_latest_may_be_older_than_the_newest_or_lost(tmp_path):
    """Killed between the rename and the writing of latest."""
    engine = trained()
    save(tmp_path, engine, 2)
    save(tmp_path, engine, 4)
    (tmp_path / "latest").write_text("step-00000002")
    assert find_checkpoint(tmp_path).name == "step-00000002"
    (tmp_path / "latest").unlink()
    assert find_checkpoint(tmp_path).name == "step-00000004"


def test_another_model_is_refused(tmp_path):
    path = tmp_path / "step-00000002"
    check_same_model(STATE, settings(), VOCAB, path)
    with pytest.raises(UserError, match=r"model.hidden_size is 24 there and 48 here"):
        check_same_model(STATE, settings(hidden_size=48), VOCAB, path)
    # How it is trained may change.
    check_same_model(STATE, settings(dropout=0.1, z_loss_weight=0.1), VOCAB, path)
    with pytest.raises(UserError, match=r"model.vocab_size is 50 there and 99 here"):
        check_same_model(STATE, settings(), 99, path)


def test_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match="expected a run directory or one of its checkpoints"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"no checkpoint at .*step-00000009"):
        find_checkpoint(tmp_path / "step-00000009")


def test_what_it_says_of_itself_is_checked(tmp_path):
    path = tmp_path / "step-00000002"
    path.mkdir()
    values = dataclasses.asdict(STATE) | {"step": "two"}
    (path / "state.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="step is 'two', expected a whole number"):
        read_state(path)
