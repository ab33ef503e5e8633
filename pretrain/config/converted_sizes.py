"""Who knows the sizes of a mixer that takes over an attention layer; see ``initialize.convert``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from pretrain.config.model import ModelConfig

Sizes = Callable[[str, dict[str, Any], ModelConfig, str], dict[str, Any]]
S = TypeVar("S", bound=Sizes)
SIZES: list[Sizes] = []


def sizes_of_converted(function: S) -> S:
    """Let a function fill in the settings of a mixer that takes over an attention layer.

    It is called with the mixer's name in the pattern, the settings that are given, the source's
    model and the file that messages begin with.
    """
    SIZES.append(function)
    return function
