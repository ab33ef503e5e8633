"""Data that changes before or while it is trained on: one sentence, not a crash or a silence."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pretrain.common.errors import UserError
from pretrain.training.callbacks import Callback
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")


class Change(Callback):
    """Changes the training shards before step 3."""

    def __init__(self, folder, change):
        self.folder, self.change = folder, change

    def before_step(self):
        if self.trainer.state.step == 2:
            change(self.folder, self.change)


def change(folder, how):
    for path in folder.glob("train-*.bin"):
        ids = np.fromfile(path, np.uint16)
        if how == "cut":
            with path.open("r+b") as file:
                file.truncate(8)
        else:
            (ids + how).astype(np.uint16).tofile(path)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (
            "cut",
            r"train-code-00000.bin was cut short while it was in use: it has 8 bytes, expected",
        ),
        (400, r"train-code-00000.bin: token \d+ is \d+, expected an id from 0 to 299"),
    ],
)
def test_shards_that_change_while_training(tmp_path, corpus, how, words):
    data = shutil.copytree(corpus, tmp_path / "data")
    run = Run(tmp_path, data, "run")
    with pytest.raises(UserError, match=words):
        Trainer(run.config, overrides=QUICK, callbacks=Change(data, how)).fit()
    assert run.losses[-1]["step"] in (2, 3)  # the data of step 3 may have been read ahead


def test_hashes_are_checked_on_request(tmp_path, corpus):
    data = shutil.copytree(corpus, tmp_path / "data")
    run = Run(tmp_path, data, "run", steps=3)
    assert Trainer(run.config, overrides=[*QUICK, "data.verify=sha256"]).fit().step == 3
    change(data, 1)
    words = r"data.verify: .*train-code-00000.bin is damaged \(its hash differs"
    with pytest.raises(UserError, match=words):
        Trainer(run.config, overrides=[*QUICK, "train.steps=4", "data.verify=sha256"]).fit()
