"""The abilities of a machine, read from ``configs/hardware/*.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from pretrain.common.config_loader import Config, ConfigError, load_config, setting
from pretrain.common.shipped_configs import find_config

_NAMES = {torch.bfloat16: "bf16", torch.float32: "float32", torch.float64: "float64"}


@dataclass
class Hardware(Config):
    """A kind of device, and how devices are connected.

    Peaks and bandwidths are the data sheet's, dense and in one direction; efficiencies say what
    share of them real work gets.
    """

    name: str
    """Name of the machine."""
    memory_gb: float = setting(above=0)
    """Memory of a device in GB (1e9 bytes)."""
    peak_tflops: dict[str, float] = field(default_factory=dict)
    """Peak TFLOP/s of matrix multiplication, by dtype (``bf16``, ``float32``)."""
    memory_bandwidth_gbs: float = setting(1000, above=0)
    """GB/s between a device and its memory."""
    device: Literal["cuda", "cpu"] = setting("cuda")
    """Kind of device."""
    devices_per_node: int = setting(8, minimum=1)
    """Devices of a node."""
    usable_memory: float = setting(0.92, above=0, maximum=1)
    """Share of the memory that is there for tensors; the rest is for driver, kernels, communication
    library and fragmentation."""
    matmul_efficiency: float = setting(0.7, above=0, maximum=1)
    """Share of the peak that large matrix multiplications get."""
    bandwidth_efficiency: float = setting(0.8, above=0, maximum=1)
    """Share of the memory bandwidth that elementwise operations get."""
    op_overhead_us: float = setting(6, minimum=0)
    """Least microseconds from one operation to the next."""
    clock_ghz: float = setting(0, minimum=0)
    """Clock of a GPU in GHz; 0: not needed."""
    warp_schedulers: int = setting(0, minimum=0)
    """Warp schedulers of a GPU, each of which issues an instruction per clock; 0: not
    needed."""
    issue_efficiency: float = setting(0.6, above=0, maximum=1)
    """Share of those instructions that our kernels issue."""
    intra_node_gbs: float = setting(100, above=0)
    """GB/s that a device can send inside its node."""
    inter_node_gbs: float = setting(25, above=0)
    """GB/s that a device can send beyond its node."""
    link_efficiency: float = setting(0.75, above=0, maximum=1)
    """Share of those that messages get."""
    latency_us: float = setting(10, minimum=0)
    """Microseconds that a message takes whatever its length."""
    watts: float = setting(0, minimum=0)
    """Power of a device with its share of the node."""
    cooling: float = setting(1.25, minimum=1)
    """The building's factor on that power (PUE)."""
    dollars_per_hour: float = setting(0, minimum=0)
    """Price of a device."""

    @property
    def memory_bytes(self) -> float:
        """Return the bytes that tensors may take of a device."""
        return self.memory_gb * 1e9 * self.usable_memory

    def peak_flops(self, precision: str) -> float:
        """Return the peak of matrix multiplication in FLOP/s.

        Raises ConfigError for a dtype that is not given.
        """
        if precision not in self.peak_tflops:
            raise ConfigError(
                f"hardware '{self.name}': peak_tflops has {sorted(self.peak_tflops)}, expected an "
                f"entry for {precision}"
            )
        return self.peak_tflops[precision] * 1e12

    def seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Return the seconds of an operation of ``flops`` that reads and writes ``moved`` bytes."""
        name = _NAMES.get(dtype, "float32")
        peak = self.peak_tflops.get(name, self.peak_tflops.get("float32", 1.0)) * 1e12
        return max(
            flops / (peak * self.matmul_efficiency),
            self.memory_seconds(moved),
            self.op_overhead_us * 1e-6,
        )

    def memory_seconds(self, moved: float) -> float:
        """Return the seconds to read and write ``moved`` bytes of a device's memory."""
        return moved / (self.memory_bandwidth_gbs * 1e9 * self.bandwidth_efficiency)

    def kernel_seconds(self, instructions: float, cycles: float) -> float:
        """Return the seconds to issue so many instructions of warps.

        ``cycles`` is the length of their longest chain.
        """
        if not self.clock_ghz or not self.warp_schedulers:
            return 0.0
        issued = instructions / (self.warp_schedulers * self.issue_efficiency)
        return max(issued, cycles) / (self.clock_ghz * 1e9)

    def link_seconds(self, sent: float, messages: float, *, spans_nodes: bool) -> float:
        """Return the seconds for a process to send bytes in so many messages or collectives."""
        speed = self.inter_node_gbs if spans_nodes else self.intra_node_gbs
        return sent / (speed * 1e9 * self.link_efficiency) + messages * self.latency_us * 1e-6


def load_hardware(path: str | Path) -> Hardware:
    """Read a hardware file, or the one of that name in configs/hardware. Raises ConfigError."""
    return load_config(Hardware, find_config(path, "hardware"))
