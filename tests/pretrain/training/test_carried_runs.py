"""Runs whose rows carry states: resumed bit for bit at every step, and refused where they cannot."""

from __future__ import annotations

import shutil

import pytest
import torch

from pretrain.checkpoint.storage import load_state
from pretrain.checkpoint_folders import checkpoint_name
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

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
    saved = [RunDirectory(run.directory).checkpoints for run in (whole, parts)]
    shutil.copytree(*(folder / checkpoint_name(step) for folder in saved))
    Trainer(parts.config, overrides=CARRIED).fit()
    expected, found = ([x for x in run.losses if x["step"] > step] for run in (whole, parts))
    assert expected
    assert found == expected
