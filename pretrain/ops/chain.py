"""Messages between neighbouring segments of a row: states, and their gradients on the way back.

They go through a communicator of their own, for states wait for one another through all layers, and
other messages between the same ranks would come in between.
"""

from __future__ import annotations

import datetime
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.data.sequences import Segment

Kind = tuple[Sequence[int], torch.dtype]  # a tensor's shape and dtype

_chains: dict[Any, Any] = {}  # communicators by context group
_rings: set[Any] = set()  # groups whose scans go from rank to rank
_sending: deque[tuple[Any, Tensor]] = deque()
_MOST_SENDING = 16  # messages that nobody has waited for


def open_chain(
    group: dist.ProcessGroup, timeout: datetime.timedelta, *, ring: bool = False
) -> None:
    """Make the communicator that states go through; every rank of ``group`` must call.

    ``ring``: whether the scans of the group's ranks use it too, see :class:`.Segment`.
    """
    if ring:
        _rings.add(group)
    _chains[group] = dist.new_group(
        dist.get_process_group_ranks(group), timeout=timeout, use_local_synchronization=True
    )


def is_ring(group: dist.ProcessGroup) -> bool:
    """Return whether the scans of the group's ranks go from rank to rank."""
    return group in _rings


@contextmanager
def planned_chain(group: dist.ProcessGroup) -> Iterator[None]:
    """Let states go through ``group`` itself, which only counts them, while open."""
    _chains[group] = group
    try:
        yield
    finally:
        del _chains[group]
        kept = [(sending, message) for sending, message in _sending if not message.is_meta]
        _sending.clear()
        _sending.extend(kept)


def close_chains() -> None:
    """Forget all communicators, which end with torch's process groups."""
    _chains.clear()
    _rings.clear()
    _sending.clear()


def send(segment: Segment, by: int, tensors: Sequence[Tensor]) -> None:
    """Start to send tensors, as one message, to the rank ``by`` further."""
    kept = _kept.get()
    if kept is not None and kept.again:
        return
    message = torch.cat([x.detach().contiguous().view(-1).view(torch.uint8) for x in tensors])
    chain = _chains[segment.group]
    _sending.append((chain.send([message], segment.rank + by, 0), message))
    while len(_sending) > _MOST_SENDING:
        _sending.popleft()[0].wait()


def receive(segment: Segment, by: int, kinds: Sequence[Kind], device: torch.device) -> list[Tensor]:
    """Wait for a message from the rank ``by`` further, and return its tensors."""
    kept = _kept.get()
    if kept is not None and kept.again:
        return kept.next()
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in kinds]
    message = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    chain = _chains[segment.group]
    chain.recv([message], segment.rank + by, 0).wait()
    parts = zip(message.split(sizes), kinds, strict=True)
    # Copies: in the message numbers do not lie where their size wants them.
    found = [part.clone().view(dtype).view(shape) for part, (shape, dtype) in parts]
    if kept is not None:
        kept.add(found)
    return found


class Kept:
    """Keep what a layer's forward pass has received, for when it runs again.

    A checkpointed block runs again in the backward pass, when its neighbours have moved on: it gets
    what it has received once more, and sends nothing.
    """

    def __init__(self) -> None:
        self.again = False
        self._received: list[list[Tensor]] = []
        self._read = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Keep what is received while open; from the second time on, give it again."""
        self._read = 0
        token = _kept.set(self)
        try:
            yield
        finally:
            _kept.reset(token)
            self.again = True

    def add(self, received: list[Tensor]) -> None:
        """Keep a message."""
        self._received.append(received)

    def next(self) -> list[Tensor]:
        """Return the next message that was kept."""
        self._read += 1
        return self._received[self._read - 1]


_kept: ContextVar[Kept | None] = ContextVar("_kept", default=None)
