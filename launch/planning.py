"""Plan a grid's members on a cluster's hardware, as ``python -m pretrain plan`` does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from launch.grid import Member
from pretrain.common.errors import UserError
from pretrain.common.screen import readable, show_table, titled_table
from pretrain.config import RunConfig


def print_plans(
    console: Console, members: Sequence[Member], hardware: str, devices: int
) -> list[str]:
    """Print the memory, time and device-hours of each member, and the total device-hours.

    Members whose model, training and layout are equal share one plan. Returns a sentence for each
    member that does not fit.
    """
    table = titled_table(
        f"planned on {devices} devices of {hardware}",
        *("member", "GB per device", "MFU", "hours", "device-hours"),
    )
    from pretrain.planner.uncertainty import Uncertainty, with_range

    plans: dict[str, Any] = {}
    total, remarks = 0.0, []
    whys: list[str] = []
    too_large: list[str] = []
    for member in members:
        key = shape_of(member.config)
        if key not in plans:
            plans[key] = plan(member.config, hardware, devices)
        found = plans[key]
        name = member.name or member.config.name
        if isinstance(found, str):
            table.add_row(name, "", "", "", "")
            remarks.append(f"{name}: no plan: {found}")
            continue
        sure = Uncertainty(found["range_factor"], found["range_why"])
        peak = max(
            *(stage["total"] for stage in found["memory"]),
            *(phase["peak_memory"] for phase in found.get("phases", [])),
            0.0,
        )
        total += found["device_hours"]
        if peak > found["memory_limit"]:
            too_large.append(
                f"{name} does not fit: {peak / 1e9:,.1f} GB of "
                f"{found['memory_limit'] / 1e9:,.1f} GB per device"
            )
        table.add_row(
            name,
            f"{peak / 1e9:,.1f}",
            f"{found['mfu']:.1%}",
            with_range(found["hours"], sure),
            with_range(found["device_hours"], sure),
        )
        whys.append(sure.why if sure.factor else f"hours have no range: {sure.why}")
    if len(members) > 1:
        table.add_section()
        table.add_row("together", "", "", "", readable(total))
    show_table(table, console)
    for remark in [*remarks, *too_large, *dict.fromkeys(whys)]:
        console.print(f"note: {remark}")
    return too_large


def shape_of(config: RunConfig) -> str:
    """Return what a run's plan depends on: runs in which it is equal have one plan."""
    sections: list[Any] = [config.model, config.train, config.parallel, *config.phases]
    sections += [] if config.distill is None else [config.distill]
    optimizer = [config.optimizer.kind, config.optimizer.ema_decay > 0]
    return json.dumps([*map(dataclasses.asdict, sections), optimizer])


def plan(config: RunConfig, hardware: str, devices: int) -> dict[str, Any] | str:
    """Return the planner's figures, or the reason why it has none."""
    from pretrain.planner.report import plan_run

    try:
        return plan_run(config, hardware, devices, config.name)
    except UserError as error:
        return str(error)
