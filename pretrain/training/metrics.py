"""Measurements of a run beside its losses: peak FLOP/s, memory, and what layers report."""

from __future__ import annotations

import resource

import torch

from pretrain.common.metrics import merge_metrics
from pretrain.training.engine import Engine

# Dense bf16 matrix-multiply peaks in FLOP/s, by a substring of the device's name, from the vendors'
# data sheets (figures "with sparsity" are twice as high and mean nothing here).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}


def peak_flops(precision: str) -> float | None:
    """Return the dense peak of this process's device in FLOP/s, or None where it is not known."""
    if not torch.cuda.is_available() or precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def peak_memory_bytes() -> int:
    """Return the most memory held so far: the GPU's where there is one, else this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class LayerMetrics:
    """The metrics of the model's layers between two lines of the log."""

    def __init__(self) -> None:
        self._found: dict[str, float] = {}

    def collect(self, engine: Engine) -> None:
        """Add what the layers of ``engine`` have measured since they were last asked."""
        merge_metrics(self._found, engine.layer_metrics())

    def add(self, found: dict[str, float]) -> None:
        """Add what was taken of a layer by somebody else."""
        merge_metrics(self._found, found)

    def take(self) -> dict[str, float]:
        """Return all that was collected, and forget it."""
        found, self._found = self._found, {}
        return found
