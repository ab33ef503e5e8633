"""What running something on a device takes: memory, kernels, and messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from pretrain.ops.shared.planning import Work, WorkKind


@dataclass(frozen=True)
class Kernel:
    """One launch on a device: its work, the bytes that it reads and writes, and their dtype."""

    work: Work
    moved: float
    dtype: torch.dtype


@dataclass
class KernelTable:
    """Kernels as arrays, to be priced together: how often each runs, its work, and its dtype."""

    kernels: Mapping[Kernel, float]

    def __post_init__(self) -> None:
        works = [kernel.work for kernel in self.kernels]
        self.times = np.array([*self.kernels.values()], dtype=float)
        self.moved = np.array([kernel.moved for kernel in self.kernels], dtype=float)
        self.flops, self.instructions, self.cycles, self.chain, self.host, self.width = (
            np.array([getattr(work, name) for work in works], dtype=float)
            for name in ("flops", "instructions", "cycles", "chain", "host", "width")
        )
        self.kinds = np.array([work.kind for work in works], dtype="U16")
        self.dtypes = list({kernel.dtype: None for kernel in self.kernels}) or [torch.float32]
        numbers = {dtype: number for number, dtype in enumerate(self.dtypes)}
        self.dtype_numbers = np.array([numbers[kernel.dtype] for kernel in self.kernels], dtype=int)

    def is_kind(self, kind: WorkKind) -> np.ndarray:
        """Return which kernels are of a kind."""
        return np.asarray(self.kinds == kind)


@dataclass
class Cost:
    """The cost of running something on one device, of whichever kind.

    Attributes:
        peak: Most bytes newly allocated at a time.
        kept: Bytes still allocated at the end.
        flops: FLOPs of matrix multiplications.
        operations: Number of operations, views included.
        bytes_sent: Bytes sent between tensor-parallel processes.
        collectives: Collectives between them.
        context_bytes: Bytes sent between context-parallel processes.
        context_messages: Collectives and messages between them.
        kernels: How often each kernel runs; not whole where costs were extrapolated.
        turn: What runs between what is received from a neighbour and what is then sent to the
            next one; None where nothing is received.
    """

    peak: float = 0.0
    kept: float = 0.0
    flops: float = 0.0
    operations: float = 0.0
    bytes_sent: float = 0.0
    collectives: float = 0.0
    context_bytes: float = 0.0
    context_messages: float = 0.0
    kernels: dict[Kernel, float] = field(default_factory=dict)
    turn: Cost | None = None
    _table: KernelTable | None = field(default=None, repr=False, compare=False)

    def table(self) -> KernelTable:
        """Return the kernels as arrays; none may be added afterwards."""
        if self._table is None:
            self._table = KernelTable(self.kernels)
        return self._table

    def add(self, kernel: Kernel) -> None:
        """Count one more run of a kernel."""
        self.flops += kernel.work.flops
        self.kernels[kernel] = self.kernels.get(kernel, 0.0) + 1.0

    def plus(self, other: Cost, times: float) -> Cost:
        """Return ``self + times * other``, field by field."""
        kernels = dict(self.kernels)
        for kernel, number in other.kernels.items():
            kernels[kernel] = kernels.get(kernel, 0.0) + times * number
        turn = self.turn
        if turn is not None and other.turn is not None:
            turn = turn.plus(other.turn, times)
        return Cost(
            self.peak + times * other.peak,
            self.kept + times * other.kept,
            self.flops + times * other.flops,
            self.operations + times * other.operations,
            self.bytes_sent + times * other.bytes_sent,
            self.collectives + times * other.collectives,
            self.context_bytes + times * other.context_bytes,
            self.context_messages + times * other.context_messages,
            {kernel: number for kernel, number in kernels.items() if number},
            turn,
        )
