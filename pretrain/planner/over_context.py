"""The time of context parallelism: messages between segments, and waiting for states."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pretrain.config import ParallelConfig
from pretrain.planner.cost import Cost
from pretrain.planner.hardware import Hardware
from pretrain.planner.units import Unit

Passed = Sequence[tuple[Unit, bool]]  # what a micro-batch goes through, and whether gradients do


@dataclass(frozen=True)
class Waits:
    """Seconds of a micro-batch's passes through a stage, and bytes that a process sends in both."""

    forward: float = 0.0
    backward: float = 0.0
    sent: float = 0.0


@dataclass(frozen=True)
class OverContext:
    """What segments of a row on several processes cost beside their work.

    ``seconds`` prices a cost: those of the device, and of Python beside it.
    """

    hardware: Hardware
    parallel: ParallelConfig
    seconds: Callable[[Cost], tuple[float, float]]

    def exchanges(self, passed: Passed) -> Waits:
        """Return the messages of units: all of them are waited for."""
        forward = [unit.forward for unit, _ in passed]
        backward = [unit.backward for unit, trained in passed if trained]
        sent = sum(cost.context_bytes for cost in (*forward, *backward))
        seconds = [sum(map(self._messages, costs)) for costs in (forward, backward)]
        return Waits(seconds[0], seconds[1], sent)

    def chain_waits(self, passed: Passed) -> Waits:
        """Return the waiting for states that are handed from segment to segment, rings included.

        A rank is in a layer while the rank before is in the next one. So l layers that hand states
        on take the time of l, and of as many more as there are segments behind the first; they
        begin anew where all ranks exchange something. The longest layer sets the pace.
        """
        hops = self._hops()
        if not hops:
            return Waits()
        forward = self._waits([unit for unit, _ in passed], 0)
        backward = self._waits([unit for unit, trained in passed if trained], 1)
        return Waits(hops * forward, hops * backward)

    def _waits(self, units: Sequence[Unit], direction: int) -> float:
        total = longest = 0.0
        for unit in units:
            costs = unit.forward, unit.backward
            if unit.unchained is not None:
                longest, costs = max(longest, self._alone(unit, direction)), unit.unchained
            turn, exchanged = costs[direction].turn, costs[direction].context_messages
            if turn is not None and unit.unchained is None:  # a ring; halos come from neighbours
                longest = max(longest, max(self.seconds(turn)) + self._messages(costs[direction]))
                exchanged = 0
            routed = unit.routed and self.parallel.expert > 1
            if exchanged or routed:  # all ranks meet
                total, longest = total + longest, 0.0
        return total + longest

    def _alone(self, unit: Unit, direction: int) -> float:
        """Return the seconds from a state's arrival to that of the next: its mixer, a message."""
        assert unit.unchained is not None
        whole, rest = (unit.forward, unit.backward)[direction], unit.unchained[direction]
        mixer = max(a - b for a, b in zip(self.seconds(whole), self.seconds(rest), strict=True))
        return max(mixer, 0.0) + self._messages(whole)

    def _messages(self, cost: Cost) -> float:
        parallel, hardware = self.parallel, self.hardware
        in_node = max(hardware.devices_per_node // parallel.tensor, 1)
        return hardware.group_seconds(
            cost.context_bytes, cost.context_messages, parallel.context, in_node
        )

    def _hops(self) -> int:
        """Return how many segments in a row begin inside a sequence: as many wait for a state."""
        rows, size = self.parallel.micro_batch_size, self.parallel.context
        inside = [bool(rank * rows % size) for rank in range(size)]
        return max(
            (len([*run]) for crossed, run in itertools.groupby(inside) if crossed), default=0
        )
