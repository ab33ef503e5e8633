"""Recurrences within torch.autocast: they choose their precisions themselves."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_DEVICES = ("cpu", "cuda")


def without_autocast(op: Callable[P, R]) -> Callable[P, R]:
    """Return ``op`` with autocast off while it runs.

    Autocast would put the float32 states into low precision, which some of what the ops need, such
    as triangular solves, does not have on a CPU.
    """

    @wraps(op)
    def wrapper(*arguments: P.args, **settings: P.kwargs) -> R:
        active = [kind for kind in _DEVICES if torch.is_autocast_enabled(kind)]
        if not active:
            return op(*arguments, **settings)
        with ExitStack() as scopes:
            for kind in active:
                scopes.enter_context(torch.autocast(kind, enabled=False))
            return op(*arguments, **settings)

    return wrapper
