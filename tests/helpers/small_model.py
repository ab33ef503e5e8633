"""A hybrid of two mixers that a CPU computes in no time."""

from __future__ import annotations

import torch

from pretrain.common.config_loader import build_config
from pretrain.config import ModelConfig
from pretrain.model.build import build_model

VOCAB = 50


def settings(**changes):
    values = {
        "hidden_size": 24,
        "pattern": "2*(gdn attn)",
        "mixers": {
            "gdn": {"num_heads": 2, "head_dim": 4, "chunk_size": 8},
            "attn": {"num_heads": 4, "num_kv_heads": 2},
        },
        "init_std": 0.2,
        **changes,
    }
    return build_config(ModelConfig, values, "test")


def make(dtype=torch.float64, seed=0, checkpointing="none", **changes):
    return build_model(
        settings(**changes), VOCAB, seed=seed, dtype=dtype, activation_checkpointing=checkpointing
    )
