"""Tensors of a checkpoint as far as this process holds them: as boxes of the full tensor.

Saved and loaded whatever layout either side has: every process writes what it alone has, and reads
what it needs; see :mod:`pretrain.checkpoint.storage`.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.nn.parameters import info_of
from pretrain.parallel.processes import replica_rank_and_size, tensor_parallel_rank

Shape = tuple[int, ...]
MOMENTS = ("exp_avg", "exp_avg_sq")


class Boxes:
    """The local boxes of one tensor of shape ``full_shape``: (offsets in it, values), disjoint.

    ``copies`` are other tensors of this process with the same boxes, which loading fills as well.
    """

    def __init__(self, full_shape: Shape, parts: Iterable[tuple[Shape, Tensor]]):
        self.full_shape = torch.Size(full_shape)
        self.parts = {torch.Size(offsets): tensor.detach() for offsets, tensor in parts}
        self.copies: list[Boxes] = []

    def size(self) -> torch.Size:
        """Return the shape of the full tensor, which loading compares with the checkpoint."""
        return self.full_shape


State = dict[str, Boxes]


def add_boxes(state: State, name: str, boxes: Boxes) -> None:
    """Add the boxes of a tensor, which several stages of this process may hold a copy of."""
    if name in state:
        state[name].copies.append(boxes)
    else:
        state[name] = boxes


class StorageError(Exception):
    """Tensors that could not be written or read; the message says why."""


class StateOfTraining(Protocol):
    """Weights and optimizer state, as far as this process has them; see UpdateBackend."""

    def weights_state(self, *, saving: bool) -> State:
        """Return every parameter's local boxes; when saving, those that this rank writes."""

    def optimizer_state(self, *, saving: bool) -> State:
        """Return the optimizer state's local boxes; when saving, those that this rank writes."""

    def loaded(self, num_updates: int, num_held: int = 0) -> None:
        """Finish loading a checkpoint after ``num_updates`` updates.

        In the first ``num_held`` of them some parameters were held.
        """


class HoldsState(Protocol):
    """A training engine, as far as checkpoints are concerned."""

    @property
    def backend(self) -> StateOfTraining:
        """Return what holds the weights and the optimizer state."""

    def carried_state(self) -> State:
        """Return what this process's rows carry from step to step, if anything."""


def global_shape(parameter: Tensor, shape: Shape) -> tuple[Shape, Shape]:
    """Return (global shape, offsets of this rank's part, which has ``shape``)."""
    full, offsets = list(shape), [0] * len(shape)
    shard = info_of(parameter).shard
    if shard is not None:
        full[shard.axis] *= shard.count
        offsets[shard.axis] = shard.index * shape[shard.axis]
    return tuple(full), tuple(offsets)


def full_part(parameter: nn.Parameter, tensor: Tensor) -> Boxes:
    """Return ``tensor``, shaped as this process's shard of ``parameter``, as one box."""
    full, offsets = global_shape(parameter, tuple(tensor.shape))
    return Boxes(full, [(offsets, tensor)])


def flat_part(
    parameter: nn.Parameter, start: int, values: Tensor, shape: Shape | None = None
) -> Boxes:
    """Return the boxes of a range of this tensor-parallel rank's shard of ``parameter``, flattened.

    ``values`` ``[n]`` are the elements from ``start`` on; ``shape`` is that of the shard, by
    default the parameter's. A range of a flattened tensor is a few boxes.
    """
    shape = tuple(parameter.shape) if shape is None else shape
    full, offsets = global_shape(parameter, shape)
    parts = []
    for corner, box, first in boxes_of_range(shape, start, len(values)):
        values_of_box = values[first : first + math.prod(box)].view(box)
        parts.append((tuple(a + b for a, b in zip(offsets, corner, strict=True)), values_of_box))
    return Boxes(full, parts)


def boxes_of_range(shape: Shape, start: int, count: int) -> Iterator[tuple[Shape, Shape, int]]:
    """Yield the boxes that the ``count`` elements from ``start`` on make up.

    They are (corner, shape, where its values begin in the range): the rest of a row, full rows, the
    beginning of a row.
    """
    if count == 0:
        return
    if not shape:
        yield (), (), 0
        return
    row = math.prod(shape[1:])
    if len(shape) == 1:
        yield (start,), (count,), 0
        return
    done = 0
    while done < count:
        index, within = divmod(start + done, row)
        rows = (count - done) // row
        if within == 0 and rows:
            yield (index, *(0 for _ in shape[1:])), (rows, *shape[1:]), done
            done += rows * row
        else:
            part = min(row - within, count - done)
            for corner, inner, first in boxes_of_range(shape[1:], within, part):
                yield (index, *corner), (1, *inner), done + first
            done += part


def writes(name: str, parameter: Tensor, *, replicas: int) -> bool:
    """Return whether this rank writes its shard of a parameter's tensor.

    All tensor-parallel ranks hold the same unless it is sharded; ``replicas`` other ranks hold
    copies (1: each has a different shard), of which one writes, in turn. The second copy of a
    tied embedding is not written.
    """
    info = info_of(parameter)
    if info.copy:
        return False
    turn = zlib.crc32(name.encode())
    if info.shard is not None and info.shard.over == "expert":
        if replicas == 1:
            return True
        from megatron.core import parallel_state

        group = parallel_state.get_expert_data_parallel_group()
        return dist.get_rank(group) == turn % dist.get_world_size(group)
    if info.shard is None and tensor_parallel_rank():
        return False
    return replicas == 1 or replica_rank_and_size()[0] == turn % replicas


def optimizer_key(key: str, name: str) -> str:
    """Return the name in a checkpoint of a parameter's optimizer state."""
    return f"optimizer.state.{key}.{name}"


def weights_state(parts: Iterable[nn.Module], *, saving: bool) -> State:
    """Return every parameter's local boxes by name; when saving, those this rank writes."""
    _, replicas = replica_rank_and_size()
    state: State = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if not saving or writes(name, parameter, replicas=replicas):
                add_boxes(state, name, full_part(parameter, parameter))
    return state
