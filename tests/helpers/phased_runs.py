"""Runs in three phases on the small corpora of tests, and what they have measured."""

from __future__ import annotations

import json

from pretrain.config import DataSource, load_run_config
from pretrain.config.phases import PhaseConfig, PhaseData, PhaseSchedule
from tests.helpers.training_run import untimed

STEPS = 9  # of a run without phases; larger batches of the last phase make one fewer


def three_phases(other):
    """Other data and shorter sequences, then longer ones in larger batches while the rate falls."""
    return [
        PhaseConfig(name="short", until=0.3, seq_len=16, micro_batch_size=4),
        PhaseConfig(name="mixed", until=0.6, data=PhaseData(blend=[DataSource(str(other))])),
        PhaseConfig(
            name="long",
            seq_len=64,
            global_batch_tokens=256,
            micro_batch_size=1,
            schedule=PhaseSchedule(final_ratio=0.5),
        ),
    ]


def configured(run, phases=(), **train):
    """The settings of a run that saves every step."""
    config = load_run_config(run.config)
    config.train.steps, config.train.tokens = None, 128 * STEPS
    config.phases = list(phases)
    config.schedule.kind, config.sample.tokens = "constant", 0
    config.checkpoint.every, config.checkpoint.keep_last = 1, 100
    config.validation.every = 2
    for name, value in train.items():
        setattr(config.train, name, value)
    return config


def rows(directory):
    """The lines of its metrics, without what depends on the machine."""
    text = (directory / "metrics.jsonl").read_text()
    return [untimed(json.loads(line)) for line in text.splitlines()]
