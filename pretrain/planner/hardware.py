"""The abilities of a machine, read from ``configs/hardware/*.yaml``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pretrain.common.config_loader import Config, ConfigError, load_config, setting
from pretrain.common.shipped_configs import find_config
from pretrain.planner.cost import Cost, KernelTable
from pretrain.planner.software import Software

_NAMES = {
    torch.bfloat16: "bf16",
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}


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
    """Peak TFLOP/s of matrix multiplication, by dtype (``fp8``, ``bf16``, ``float32``);
    0: it has none."""
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
    attention_efficiency: dict[str, float] = field(default_factory=lambda: {"flash2": 0.4})
    """Share of the peak that attention gets with heads of 128 channels, by generation of its
    kernels (``flash1`` of 2023, ``flash2``)."""
    recurrence_efficiency: float = setting(0.4, above=0, maximum=1)
    """Share of the peak that the products inside kernels of linear recurrences get."""
    recurrence_bandwidth: float = setting(0.6, above=0, maximum=1)
    """Share of the memory bandwidth that those kernels get."""
    bandwidth_efficiency: float = setting(0.8, above=0, maximum=1)
    """Share of the memory bandwidth that elementwise operations get."""
    kernel_us: float = setting(2, minimum=0)
    """Microseconds that a kernel takes beyond its work: to start, to fill the device and to end."""
    op_overhead_us: float = setting(6, minimum=0)
    """Microseconds of Python from one launch to the next."""
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
    overlap_cost: float = setting(0.4, minimum=0, maximum=1)
    """Share of the time of an exchange beside computation that the computation loses to it: both
    want the same memory and multiprocessors."""
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
        if not self.peak_tflops.get(precision):
            found = sorted(name for name, peak in self.peak_tflops.items() if peak)
            raise ConfigError(
                f"hardware '{self.name}': peak_tflops has {found}, expected an entry for "
                f"{precision}"
            )
        return self.peak_tflops[precision] * 1e12

    def cost_seconds(self, cost: Cost, software: Software) -> tuple[float, float]:
        """Return the seconds of the device, and of Python beside it, for all kernels of a cost."""
        table = cost.table()
        device = float(table.times @ self.kernel_seconds(table, software))
        if self.device == "cpu":  # Python is beside every operation
            return device, 0.0
        host = float(table.times @ (self.op_overhead_us + table.host)) * 1e-6
        return device, host

    def kernel_seconds(self, table: KernelTable, software: Software) -> np.ndarray:
        """Return the seconds on the device of each kernel of a table."""
        peaks = [self._peak(dtype) for dtype in table.dtypes]
        peak = np.array(peaks)[table.dtype_numbers]
        products = table.flops / (peak * self.matmul_efficiency)
        bandwidth = self.memory_bandwidth_gbs * 1e9
        traffic = table.moved / (bandwidth * self.bandwidth_efficiency)
        if self.device == "cpu":
            return np.maximum(np.maximum(products, traffic), self.op_overhead_us * 1e-6)
        # Products and memory traffic of a kernel overlap, but not fully.
        busy = np.hypot(products * software.product_time, traffic)
        is_elementwise, is_attention, is_scan = (
            table.is_kind(kind) for kind in ("elementwise", "attention", "scan")
        )
        is_delta, is_linear = (table.is_kind(k) for k in ("delta_rule", "linear_attention"))
        busy = np.where(is_elementwise, busy * software.elementwise_time, busy)
        if is_attention.any():
            # The softmax of a pair of tokens takes as long whatever the head's width.
            share = self._attention(software) * 1.25 * table.width / (table.width + 32.0)
            arithmetic = table.flops / (peak * np.maximum(share, 1e-9))
            busy = np.where(is_attention, np.hypot(arithmetic, traffic), busy)
        if is_delta.any() or is_linear.any():
            linear = table.moved / (bandwidth * self.recurrence_bandwidth)
            linear = linear + table.flops / (peak * self.recurrence_efficiency)
            # About a third of it passes states from chunk to chunk, one after the other.
            linear = 0.65 * linear + np.maximum(0.35 * linear, table.chain * 1e-6)
            busy = np.where(is_delta, linear * software.delta_rule_time, busy)
            busy = np.where(is_linear, linear * software.linear_attention_time, busy)
        if is_scan.any():
            steps = table.cycles * software.step_time
            issue = self._issue_seconds(table.instructions, steps)
            busy = np.where(is_scan, np.maximum(np.maximum(products, traffic), issue), busy)
        return busy + self.kernel_us * 1e-6

    def _peak(self, dtype: torch.dtype) -> float:
        name = _NAMES.get(dtype, "float32")
        return self.peak_tflops.get(name, self.peak_tflops.get("float32", 1.0)) * 1e12

    def _attention(self, software: Software) -> float:
        found = self.attention_efficiency
        return found.get(software.attention, max(found.values()))

    def memory_seconds(self, moved: float) -> float:
        """Return the seconds to read and write ``moved`` bytes of a device's memory."""
        return moved / (self.memory_bandwidth_gbs * 1e9 * self.bandwidth_efficiency)

    def _issue_seconds(self, instructions: np.ndarray, cycles: np.ndarray) -> np.ndarray:
        """Return the seconds to issue instructions of warps, their longest chain of ``cycles``."""
        if not self.clock_ghz or not self.warp_schedulers:
            return np.zeros_like(cycles)
        issued = instructions / (self.warp_schedulers * self.issue_efficiency)
        longest: np.ndarray = np.maximum(issued, cycles) / (self.clock_ghz * 1e9)
        return longest

    def link_seconds(self, sent: float, messages: float, *, spans_nodes: bool) -> float:
        """Return the seconds for a process to send bytes in so many messages or collectives."""
        speed = self.inter_node_gbs if spans_nodes else self.intra_node_gbs
        return sent / (speed * 1e9 * self.link_efficiency) + messages * self.latency_us * 1e-6

    def group_seconds(self, sent: float, collectives: float, size: int, per_node: int) -> float:
        """Return the seconds for every one of ``size`` processes to send bytes in collectives.

        ``per_node`` of them share a node: their messages to other nodes use all its adapters.
        """
        speed, per_node = self.intra_node_gbs, min(per_node, size)
        if size > per_node:
            speed = min(speed, self.inter_node_gbs * per_node)
        latency = self.latency_us + size  # a microsecond for each step of a ring
        return sent / (speed * 1e9 * self.link_efficiency) + collectives * latency * 1e-6

    def waited(self, exchange: float, beside: float) -> float:
        """Return the seconds that an exchange beside work of so many seconds costs."""
        hidden = min(exchange, beside)
        return exchange - hidden + self.overlap_cost * hidden


def load_hardware(path: str | Path) -> Hardware:
    """Read a hardware file, or the one of that name in configs/hardware. Raises ConfigError."""
    return load_config(Hardware, find_config(path, "hardware"))
