"""How a training program runs the layers on a GPU: what a plan assumes besides the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Software:
    """How a training program runs the layers on a GPU; the default is this project's own way.

    Others are there so that published measurements of other programs can be planned
    (benchmarks/planner_calibration.py).
    """

    elementwise: Literal["fused", "eager"] = "fused"
    """Chains of elementwise operations as one kernel, or each operation as its own."""
    attention: Literal["flash1", "flash2", "flash3"] | None = None
    """Generation of the attention kernel; None: the newest that the GPU has."""
    recurrences: Literal["ours", "published"] = "ours"
    """Kernels of non-linear recurrences."""
    state_bytes: float | None = None
    """Bytes per parameter of weights, gradients and optimizer together; None: as here."""
