"""Sizes of activations and updates of tiny models over the width."""

from __future__ import annotations

import numpy as np

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig, OptimizerConfig, RunConfig
from pretrain.data.batches import pack_rows
from pretrain.model.widths import widened
from pretrain.training.coordinates import measure
from pretrain.training.coordinates_report import Sizes, rows_of

BASE, VOCAB = 64, 50


def batch_of(seed):
    """A sequence of few different tokens: what is learned of one is used by the others."""
    tokens = np.random.default_rng(seed).integers(0, 6, (1, 33))
    return pack_rows(tokens, eod_id=7)


def settings(**model):
    """Of a model of the base width."""
    values = {"hidden_size": BASE, "init_std": 0.1, "mup_base_hidden_size": BASE, **model}
    return build_config(ModelConfig, values, "test")


def rows(kind, *, widths=(BASE, 4 * BASE), seeds=3, lr=4e-3, steps=5, **model):
    """The rows of the table, of models described by ``model`` at the base width, by name."""
    config = settings(**model)
    sizes: Sizes = {}
    for width in widths:
        for seed in range(seeds):
            optimizer = OptimizerConfig(kind=kind, lr=lr)
            run = RunConfig("test", widened(config, width), optimizer=optimizer, seed=seed)
            for place, found in measure(run, VOCAB, batch_of(seed), steps).items():
                sizes.setdefault(place, {}).setdefault(seed, {})[width] = found
    return {row.name: row for row in rows_of(sizes)}
