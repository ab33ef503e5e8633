"""Pretraining of language models whose layers are mixed freely.

The names below are the public API, see docs/library.md. They are loaded when they are first used:
importing this package imports neither torch nor megatron-core and changes nothing of the process.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pretrain.common.errors import UserError
    from pretrain.config import ConfigError, ModelConfig, RunConfig, load_run_config
    from pretrain.data.sequences import Sequences
    from pretrain.library import build_model, load, mixer
    from pretrain.run_directory import Run
    from pretrain.training.callbacks import Callback
    from pretrain.training.trainer import Trainer

_HOMES = {
    "Callback": "pretrain.training.callbacks",
    "ConfigError": "pretrain.config",
    "ModelConfig": "pretrain.config",
    "Run": "pretrain.run_directory",
    "RunConfig": "pretrain.config",
    "Sequences": "pretrain.data.sequences",
    "Trainer": "pretrain.training.trainer",
    "UserError": "pretrain.common.errors",
    "build_model": "pretrain.library",
    "load": "pretrain.library",
    "load_run_config": "pretrain.config",
    "mixer": "pretrain.library",
}

__all__ = [
    "Callback",
    "ConfigError",
    "ModelConfig",
    "Run",
    "RunConfig",
    "Sequences",
    "Trainer",
    "UserError",
    "build_model",
    "load",
    "load_run_config",
    "mixer",
]


def __getattr__(name: str) -> Any:
    """Load a name of the public API."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pretrain' has no attribute '{name}'")
    if _HOMES[name] == "pretrain.config":  # a ModelConfig's pattern is checked by what knows layers
        importlib.import_module("pretrain.model.spec")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """Return the names of the public API."""
    return sorted([*globals(), *__all__])
