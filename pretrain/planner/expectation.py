"""What a run on known GPUs is expected to take, in a sentence before it starts."""

from __future__ import annotations

from pretrain.config import RunConfig
from pretrain.parallel.context import CellsOverSegments
from pretrain.planner.cost_of_run import run_cost
from pretrain.planner.estimate import Planner, has_cells
from pretrain.planner.hardware import load_hardware
from pretrain.planner.uncertainty import uncertainty, with_range


def known_hardware(device_name: str, memory: float) -> str | None:
    """Return the shipped hardware file of a GPU by the name that its driver gives; None: none.

    ``memory``: its bytes, which tell A100 of 40 GB from those of 80.
    """
    for name in ("h100", "h200", "b200"):
        if name.upper() in device_name:
            return name
    if "A100" in device_name:
        return "a100-40gb" if memory < 60e9 else "a100-80gb"
    return None


def expected_time(config: RunConfig, vocab_size: int, hardware: str, devices: int) -> str:
    """Return a sentence of the run's planned hours and speed, each with its range."""
    planner = Planner(config, vocab_size, load_hardware(hardware))
    estimate = planner.estimate(config.parallel, devices)
    sure = uncertainty(config, planner.hardware)
    hours = run_cost(estimate, config, planner.hardware)["hours"]
    range_ = "" if sure.factor else f" (no range: {sure.why})"
    return (
        f"planned: {with_range(hours, sure)} hours at "
        f"{with_range(estimate.tokens_per_second, sure)} tokens/s on {devices} x "
        f"{planner.hardware.name}, {estimate.peak_memory / 1e9:,.0f} GB each{range_}"
    )


def planned_cells(
    config: RunConfig, vocab_size: int, hardware: str, devices: int
) -> CellsOverSegments:
    """Return how sequential cells are planned to be faster under context parallelism."""
    if not has_cells(config.model):
        return "chain"
    planner = Planner(config, vocab_size, load_hardware(hardware))
    found = planner.estimate(config.parallel, devices).parallel.context_cells
    return "heads" if found == "heads" else "chain"
