"""The hours, energy and price of a whole run."""

from __future__ import annotations

from pretrain.config import RunConfig
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware


def run_cost(estimate: Estimate, config: RunConfig, hardware: Hardware) -> dict[str, float]:
    """Return ``hours``, ``device_hours``, ``kilowatt_hours`` and ``dollars`` of all steps.

    The trunk's steps of a branch are not counted.
    """
    hours = estimate.step_seconds * (config.train.num_steps - config.first_step) / 3600
    device_hours = hours * estimate.devices
    return {
        "hours": hours,
        "device_hours": device_hours,
        "kilowatt_hours": device_hours * hardware.watts * hardware.cooling / 1000,
        "dollars": device_hours * hardware.dollars_per_hour,
    }
