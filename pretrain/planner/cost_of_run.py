"""The hours, energy and price of a whole run."""

from __future__ import annotations

from collections.abc import Sequence

from pretrain.config import RunConfig
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware
from pretrain.planner.phases import PlannedPhase


def run_cost(
    estimate: Estimate, config: RunConfig, hardware: Hardware, phases: Sequence[PlannedPhase] = ()
) -> dict[str, float]:
    """Return ``hours``, ``device_hours``, ``kilowatt_hours`` and ``dollars`` of all steps.

    Those of each of ``phases``; where a run has phases and they are not given, all of its tokens
    are taken to be as fast as those of ``estimate``. The trunk's steps of a branch are not counted.
    """
    plan, first = config.plan, config.first_step
    if phases:
        seconds = sum(phase.seconds_from(first) for phase in phases)
    elif config.phases:
        seconds = (plan.tokens - plan.tokens_before(first)) / estimate.tokens_per_second
    else:
        seconds = estimate.step_seconds * (plan.num_steps - first)
    hours = seconds / 3600
    device_hours = hours * estimate.devices
    return {
        "hours": hours,
        "device_hours": device_hours,
        "kilowatt_hours": device_hours * hardware.watts * hardware.cooling / 1000,
        "dollars": device_hours * hardware.dollars_per_hour,
    }
