"""Measured speeds of runs in phases."""

from __future__ import annotations

from launch import throughput
from pretrain.common.config_loader import build_config
from pretrain.config import RunConfig


def configured(*phases):
    values = {
        "name": "x",
        "model": {"hidden_size": 8, "pattern": "attn"},
        "data": {"path": "x"},
        "train": {"tokens": 6400, "seq_len": 16, "global_batch_tokens": 64},
        "parallel": {"micro_batch_size": 4},
        "phases": list(phases),
    }
    return build_config(RunConfig, values, "x.yaml")


def test_phases_are_measured_each_and_weighed_by_their_tokens(monkeypatch):
    """At 100 tokens per second with sequences of 8, at 50 with those of 16."""
    measured = []

    def of_settings(config, steps, processes):
        assert (steps, processes, config.phases) == (8, 2, [])
        measured.append(config.train.seq_len)
        return 800 / config.train.seq_len

    monkeypatch.setattr(throughput, "_measure", of_settings)
    short = {"name": "short", "until": 0.25, "seq_len": 8}
    mixed = {"name": "mixed", "until": 0.5, "data": {"path": "y"}}
    speed = throughput.measure(configured(short, mixed, {}), 8, 2)
    assert speed.phases == {"short": 100, "mixed": 50, "phase 3": 50}
    assert measured == [8, 16]
    assert speed.tokens_per_second == 6400 / (1600 / 100 + 4800 / 50)
    assert throughput.measure(configured(), 8, 2) == (50, {})
