"""Chains of elementwise operations made into one kernel by torch.compile, on GPUs alone.

A CPU gains little from it and would wait for a compiler; there the functions run as they are
written. Only what needs no more than its tensors belongs here: no groups, no states. Compiled, a
function keeps its inputs for the backward pass, and at most one number a row of what it computes;
with selective activation checkpointing its results are recomputed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any, TypeVar, overload

import torch
from torch import Tensor

from pretrain.ops.shared.planning import fused_stand_in, is_planned, plans_fused
from pretrain.ops.shared.recomputation import recomputed

F = TypeVar("F", bound=Callable[..., Any])

_FORMS = 64  # that a function may be compiled in: mixers' shapes, with gradients and without, ...


@overload
def fused(function: F) -> F: ...


@overload
def fused(*, linear: bool = ..., native: bool = ...) -> Callable[[F], F]: ...


def fused(function: Any = None, *, linear: bool = False, native: bool = False) -> Any:
    """Return ``function``, compiled at its first call with CUDA tensors; ``compiled`` is how.

    ``linear``: whether it is linear in its first argument, which is not kept then. ``native``:
    whether programs that fuse nothing have a kernel of it, too, for plans of those.
    """
    if function is None:
        return partial(fused, linear=linear, native=native)
    made: list[Callable[..., Any]] = []

    def compiled(*arguments: Any) -> Any:
        if not made:
            # torch's own limit of 8 ends within one hybrid, which then runs uncompiled.
            limit = torch._dynamo.config.recompile_limit
            torch._dynamo.config.recompile_limit = max(limit, _FORMS)
            made.append(torch.compile(function))
        return made[0](*arguments)

    def run(*arguments: Any) -> Any:
        if plans_fused(*arguments) or (native and is_planned(*arguments)):
            return fused_stand_in(function, arguments, linear=linear)
        on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in arguments)
        return compiled(*arguments) if on_gpu else function(*arguments)

    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return recomputed(run, *arguments)

    wrapper.compiled = compiled  # type: ignore[attr-defined]
    return wrapper
