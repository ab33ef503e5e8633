"""A model whose rows carried states uses what lies beyond a row's length, as positions show."""

from __future__ import annotations

import random

import pytest

from data_prep.config import load_data_config
from data_prep.prepare import prepare
from evals.positions import evaluate_positions
from pretrain.inference.load import load_model
from pretrain.training.trainer import Trainer

pytestmark = pytest.mark.slow
ROW = 32
CONFIG = """
name: {name}
model: {{hidden_size: 32, pattern: gdn, mlp: {{kind: none}}}}
data: {{path: {data}}}
optimizer: {{lr: 1e-2}}
schedule: {{warmup_steps: 10}}
train: {{steps: 300, seq_len: 32, global_batch_tokens: 512, carry_steps: 16}}
parallel: {{micro_batch_size: 16}}
validation: {{every: 0, tokens: 64}}
sample: {{tokens: 0}}
directory: {directory}
"""


def document(number):
    """A text that says its letter at its beginning, and again after every 10 to 45 words."""
    chance = random.Random(number)
    letter = chance.choice("ABCDEFGH")
    words = [letter]
    for _ in range(60):
        words += [chance.choice("xy") for _ in range(chance.randint(10, 45))]
        words.append(f"is {letter}")
    return " ".join(words)


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("letters")
    for number in range(300):
        (folder / f"{number:03d}.txt").write_text(document(number))
    (folder / "data.yaml").write_text(
        f"output: {folder / 'data'}\n"
        f"sources: [{{name: letters, kind: files, paths: ['{folder}/*.txt']}}]\n"
        "tokenizer: {vocab_size: 282}\nvalidation_fraction: 0.1\nprocesses: 1\n"
    )
    prepare(load_data_config(folder / "data.yaml"))
    return folder / "data"


def losses_by_position(letters, folder, name, *overrides):
    """Mean losses within the last half of a row's length, and beyond it up to 8 times."""
    config, directory = folder / f"{name}.yaml", folder / name
    config.write_text(CONFIG.format(name=name, data=letters, directory=directory))
    Trainer(config, overrides=overrides).fit()
    found = evaluate_positions(load_model(directory), factor=8, sequences=16)
    beyond = [b for b in found["bins"] if b["from"] >= ROW]
    weights = [b["to"] - b["from"] for b in beyond]
    total = sum(b["nats_per_token"] * n for b, n in zip(beyond, weights, strict=True))
    return total / sum(weights) - found["beyond_training_length"], total / sum(weights)


@pytest.mark.usefixtures("processes")
def test_a_model_that_carried_states_is_better_beyond_the_length_of_a_row(letters, tmp_path):
    _, plain = losses_by_position(letters, tmp_path, "plain")
    within, carried = losses_by_position(letters, tmp_path, "carried", "train.carry_state=true")
    # To know which of 8 letters comes is worth ln 8 for every 29 words: 0.07 nats per token.
    assert carried < plain - 0.03
    assert carried < within
