"""Runs with ``train.segment_tokens``: resumed bit for bit, and refused where it cannot be."""

from __future__ import annotations

import pytest

from pretrain.common.config_loader import ConfigError
from pretrain.training.trainer import Trainer
from tests.helpers.training_run import QUICK, Run

pytestmark = pytest.mark.usefixtures("no_groups")
SEGMENTS = (*QUICK, "train.segment_tokens=16")


def test_a_resumed_run_is_bit_for_bit_that_of_an_uninterrupted_one(tmp_path, corpus):
    whole, parts, without = (
        Run(tmp_path, corpus, n, steps=4) for n in ("whole", "parts", "without")
    )
    Trainer(whole.config, overrides=SEGMENTS).fit()
    Trainer(parts.config, overrides=[*SEGMENTS, "train.steps=2"]).fit()
    Trainer(parts.config, overrides=SEGMENTS).fit()
    assert parts.losses == whole.losses
    Trainer(without.config, overrides=QUICK).fit()
    for found, expected in zip(whole.losses, without.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.segment_tokens=24"], "24, expected a divisor of the row's .* = 64 tokens"),
        (
            ["train.activation_checkpointing=block"],
            "16 and train.activation_checkpointing block, expected .* none with segments",
        ),
        (["parallel.pipeline=2"], "16 and parallel.pipeline 2, expected parallel.pipeline 1 "),
        (["parallel.context=2"], "16 and parallel.context 2, expected parallel.context 1 "),
        (
            ["parallel.zero_backend=deepspeed"],
            "16 and parallel.zero_backend deepspeed, expected parallel.zero_backend megatron",
        ),
        (
            ["model.moe={num_experts: 4, top_k: 2, intermediate_size: 8, capacity_factor: 1.5}"],
            "16 and model.moe.capacity_factor 1.5, expected model.moe.capacity_factor null",
        ),
        (
            ["model.recursion={times: 2}"],
            "16 and model.recursion set, expected model.recursion null with segments",
        ),
        (
            ["parallel.tensor=4", "parallel.sequence=true", "train.segment_tokens=2"],
            "2, expected a multiple of parallel.tensor = 4",
        ),
    ],
)
def test_what_does_not_go_with_segments_is_refused(run, overrides, message):
    with pytest.raises(ConfigError, match=f"train.segment_tokens is {message}"):
        Trainer(run.config, overrides=[*SEGMENTS, *overrides])
