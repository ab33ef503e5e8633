"""Find the members of a grid that this machine cannot hold, before any of them starts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from launch.grid import Member
from launch.local import processes_of
from launch.planning import shape_of
from pretrain.common.errors import UserError
from pretrain.config import RunConfig
from pretrain.model.counts import count_model
from pretrain.parallel.cpu import importing_megatron
from pretrain.planner.planned_run import planned_vocab_size
from pretrain.training.free_memory import free_memory, free_on_gpus
from pretrain.training.preflight import Room, most_state_bytes, state_that_fits


@dataclass
class _Shape:
    """Runs of one shape: one of them, its vocabulary and processes, and the members' names.

    ``sharing`` of the processes share the memory.
    """

    config: RunConfig
    vocab_size: int
    count: int
    sharing: int
    names: list[str] = field(default_factory=list)

    def most_bytes(self) -> float:
        """Return the most that a run can hold in every step, of the memory that runs share."""
        seq_len = self.config.train.seq_len
        parameters = count_model(self.config.model, self.vocab_size, seq_len).parameters
        most = most_state_bytes(self.config, parameters)
        return float("inf") if most is None else self.sharing * most

    def bytes(self, free: float) -> tuple[float, str | None]:
        """Return what a run holds in every step, and why it does not fit into ``free`` bytes."""
        room = Room(free / self.sharing, self.count)
        state, why = state_that_fits(self.config, self.vocab_size, self.count, room)
        return self.sharing * state, why


def what_does_not_fit(
    members: Sequence[Member], processes: int | None = None, at_once: int = 1
) -> list[str]:
    """Return a sentence for each member whose state overfills this machine's memory.

    As :func:`pretrain.training.preflight.check_memory` has it, which a run asks when it starts.
    Where each fits, there is one for members that do not fit beside each other, ``at_once`` at a
    time. Members of equal shape are planned once, and where all are small none is.
    """
    cuda = torch.cuda.is_available()
    free = free_on_gpus() if cuda else free_memory()
    shapes = _shapes(members, processes, cuda)
    if sum(_largest([(shape.most_bytes(), shape.names) for shape in shapes], at_once)) <= free:
        return []
    found, sizes, named = [], [], []
    for shape in shapes:
        size, why = shape.bytes(free)
        sizes.append((size, shape.names))
        named += [(size, name) for name in shape.names]
        if why is not None:
            found += [f"{name} does not fit: {why}" for name in shape.names]
    together = sum(_largest(sizes, at_once))
    if not found and together > free:
        names = [name for _, name in sorted(named, key=lambda pair: -pair[0])[:at_once]]
        found.append(
            f"{' and '.join(names)} do not fit beside each other: their weights, gradients and "
            f"optimizer state take {together / 1e9:,.1f} GB, but {free / 1e9:,.1f} GB are free on "
            f"{'a GPU' if cuda else 'this machine'}; expected a smaller --at-once than {at_once}"
        )
    return found


def _largest(sizes: Sequence[tuple[float, list[str]]], number: int) -> list[float]:
    """Return the largest sizes of members, of shapes with their members' names."""
    return sorted((size for size, names in sizes for _ in names), reverse=True)[:number]


def _shapes(members: Sequence[Member], processes: int | None, cuda: bool) -> list[_Shape]:
    shapes, vocab_sizes = dict[str, _Shape](), dict[str, int | None]()
    for member in members:
        config = member.config
        data = json.dumps([config.model.vocab_size, asdict(config.data)], default=str)
        if data not in vocab_sizes:
            vocab_sizes[data] = _vocab_size(config)
        vocab_size, count = vocab_sizes[data], processes_of(config, processes)
        if vocab_size is None:
            continue  # its start says what is missing
        key = f"{shape_of(config)} {vocab_size}"
        if key not in shapes:
            shapes[key] = _Shape(config, vocab_size, count, 1 if cuda else count)
        shapes[key].names.append(member.name or config.name)
    return list(shapes.values())


def _vocab_size(config: RunConfig) -> int | None:
    try:
        with importing_megatron():  # which reads the data's index
            return planned_vocab_size(config, config.name)
    except UserError:
        return None
