"""The arguments of a Trainer: what is no configuration, or no overrides, is refused by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pretrain.common.config_loader import ConfigError
from pretrain.config import RunConfig


def check_arguments(config: object, overrides: object) -> None:
    """Raise ConfigError unless ``config`` is a run's settings or file, ``overrides`` strings."""
    if not isinstance(config, RunConfig | str | Path):
        raise ConfigError(
            f"Trainer: config is {describe(config)}, expected a RunConfig or the path of a run's "
            "YAML file"
        )
    if isinstance(overrides, str) or not isinstance(overrides, Sequence):
        raise ConfigError(
            f"Trainer: overrides is {describe(overrides)}, expected a list of strings, such as "
            "['train.steps=2']"
        )
    for override in overrides:
        if not isinstance(override, str):
            raise ConfigError(
                f"Trainer: overrides has {describe(override)}, expected strings such as "
                "'train.steps=2'"
            )


def describe(value: object) -> str:
    """Return what ``value`` is, for a message."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, str | int | float):
        return repr(value)
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
