"""Tensors without values that stand for ones on a device, for plans made of the ops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_planned: ContextVar[str] = ContextVar("_planned", default="cpu")


@dataclass(frozen=True)
class Work:
    """The work of a kernel, counted from its compiled code for plans.

    Attributes:
        flops: matrix-multiply FLOPs.
        instructions: instructions of warps that it issues.
        cycles: length of its longest chain of steps that wait for each other.
    """

    flops: float
    instructions: float
    cycles: float

    def share(self, part: float) -> Work:
        """Scale all counts by ``part``."""
        return Work(self.flops * part, self.instructions * part, self.cycles * part)


# (work, bytes of its tensors, their dtype) of a kernel that would run
Observer = Callable[[Work, float, torch.dtype], None]
_observer: ContextVar[Observer | None] = ContextVar("_observer", default=None)
# Stands for torch's attention, which chooses its kernel by the tensors' device.
Attention = Callable[..., Tensor]
_attention: ContextVar[Attention | None] = ContextVar("_attention", default=None)


@contextmanager
def planned_device(
    kind: str, observer: Observer | None = None, attention: Attention | None = None
) -> Iterator[None]:
    """Let tensors on the meta device stand for ones on a device of type ``kind`` while open.

    ``observer`` is called with every kernel that would run; ``attention`` in the place of
    ``F.scaled_dot_product_attention``, with its arguments.
    """
    tokens = _planned.set(kind), _observer.set(observer), _attention.set(attention)
    try:
        yield
    finally:
        _planned.reset(tokens[0])
        _observer.reset(tokens[1])
        _attention.reset(tokens[2])


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor, **settings: Any) -> Tensor:
    """Call torch's attention, or what stands for it in a plan."""
    planned = _attention.get()
    return (F.scaled_dot_product_attention if planned is None else planned)(q, k, v, **settings)


def observe(work: Work, moved: float, dtype: torch.dtype) -> None:
    """Report a kernel that would run to whoever plans."""
    observer = _observer.get()
    if observer is not None:
        observer(work, moved, dtype)


def device_type(x: Tensor) -> str:
    """Return the type of x's device; on the meta device, of the one that x stands for."""
    return _planned.get() if x.is_meta else x.device.type


def count_true(mask: Tensor, assumed: int) -> int:
    """Return how many elements are true; ``assumed`` on the meta device, where none has a value."""
    return assumed if mask.is_meta else int(mask.sum())
