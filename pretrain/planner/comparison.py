"""Several architectures on the same hardware and budget: ``plan CONFIG --compare CONFIG ...``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from pretrain.common.errors import UserError
from pretrain.common.files import write_figure
from pretrain.common.plots import plot_text
from pretrain.common.screen import readable, show_table, titled_table
from pretrain.model.layout import check_layout
from pretrain.planner.cost_of_run import run_cost
from pretrain.planner.estimate import Planner
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware
from pretrain.planner.planned_run import (
    assumes_checkpointing,
    choose_checkpointing,
    load_planned,
    planned_vocab_size,
)
from pretrain.planner.search import nothing_fits, search
from pretrain.planner.uncertainty import Uncertainty, uncertainty, with_range


@dataclass
class Architecture:
    """One of the architectures that are compared, and its plan."""

    name: str
    planner: Planner
    estimate: Estimate
    checkpointing: str
    sure: Uncertainty

    @property
    def fits(self) -> bool:
        """Return whether a device has the memory."""
        return self.estimate.peak_memory <= self.planner.hardware.memory_bytes


def plan_architectures(
    paths: Sequence[str],
    overrides: list[str],
    hardware: Hardware,
    devices: int | None,
    *,
    best_layout: bool,
) -> list[Architecture]:
    """Plan every config on the same devices, for the tokens that the first one is trained on.

    With ``best_layout`` each has the fastest layout that fits, else the one of its settings. Raises
    UserError for configs that cannot be planned, and where none fits.
    """
    found: list[Architecture] = []
    tokens = None
    for path in paths:
        budget: list[str] = [] if tokens is None else [f"train.tokens={tokens}", "train.steps=null"]
        config = load_planned(path, [*overrides, *budget])
        if tokens is None:
            tokens = config.plan.tokens
        hardware.peak_flops(config.train.precision)
        planner = Planner(config, planned_vocab_size(config, path), hardware)
        count = devices or config.parallel.model_size
        if best_layout:
            tried = search(planner, count)
            best = tried[0]
            if best.why or best.estimate is None:
                raise UserError(f"{path}: {nothing_fits(config, tried, count)}")
            estimate, checkpointing = best.estimate, best.checkpointing
        else:
            check_layout(config, count, path)
            if assumes_checkpointing(path, overrides):
                choose_checkpointing(planner, count)
            estimate = planner.estimate(config.parallel, count)
            checkpointing = config.train.activation_checkpointing
        sure = uncertainty(config, hardware, estimate.parallel.context)
        found.append(Architecture(config.name, planner, estimate, checkpointing, sure))
    return found


def print_architectures(console: Console, found: Sequence[Architecture]) -> None:
    """Print one row for each architecture."""
    first = found[0]
    train, hardware = first.planner.config.train, first.planner.hardware
    tokens = first.planner.config.plan.tokens
    table = titled_table(
        f"{readable(tokens / 1e9)}B tokens in sequences of {train.seq_len:,} on "
        f"{first.estimate.devices} x {hardware.name}",
        *("model", "parameters", "layout", "ckpt", "GB", "tokens/s", "MFU", "days", "$"),
    )
    for one in found:
        estimate, sure = one.estimate, one.sure
        cost = run_cost(estimate, one.planner.config, one.planner.hardware)
        layout = estimate.parallel.describe(estimate.devices, "device")
        table.add_row(
            one.name,
            f"{one.planner.counts.parameters / 1e9:.2f}B",
            f"{layout}, {estimate.parallel.micro_batch_size} rows",
            one.checkpointing,
            f"{estimate.peak_memory / 1e9:,.1f}" + ("" if one.fits else "!"),
            with_range(estimate.tokens_per_second, sure),
            f"{estimate.mfu:.1%}",
            with_range(cost["hours"] / 24, sure),
            with_range(cost["dollars"], sure),
        )
    show_table(table, console)
    limit = hardware.memory_bytes / 1e9
    for one in found:
        if not one.fits:
            console.print(
                f"note: {one.name} does not fit: {one.estimate.peak_memory / 1e9:,.1f} GB of "
                f"{limit:,.1f} GB; --search shows what does"
            )
    for why in dict.fromkeys(one.sure.why for one in found):
        names = ", ".join(one.name for one in found if one.sure.why == why)
        console.print(f"note: {names}: {why}")


def draw_architectures(path: Path, found: Sequence[Architecture]) -> None:
    """Draw tokens/s with their ranges, and memory against what a device has, into a picture."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    names = [plot_text(one.name, 40) for one in found]
    speeds = [one.estimate.tokens_per_second / one.estimate.devices for one in found]
    errors: list[list[float]] = [[], []]
    for one, speed in zip(found, speeds, strict=True):
        errors[0].append(speed - (one.sure.low(speed) or speed))
        errors[1].append((one.sure.high(speed) or speed) - speed)
    figure, (left, right) = plt.subplots(
        1, 2, sharey=True, figsize=(10, 1.2 + 0.42 * len(found)), layout="constrained"
    )
    rows = range(len(found))
    left.barh(rows, speeds, color="#4477aa")
    known = [row for row in rows if found[row].sure.factor is not None]
    left.errorbar(
        [speeds[row] for row in known],
        known,
        xerr=[[side[row] for row in known] for side in errors],
        fmt="none",
        ecolor="#222222",
        capsize=3,
    )
    left.set_yticks(rows, names)
    left.invert_yaxis()
    left.set_xlabel("planned tokens/s of a device (no line: nothing like it was measured)")
    memory = [one.estimate.peak_memory / 1e9 for one in found]
    right.barh(rows, memory, color=["#4477aa" if one.fits else "#cc3311" for one in found])
    right.axvline(found[0].planner.hardware.memory_bytes / 1e9, color="#222222", linestyle="--")
    right.set_xlabel("GB of a device (dashed: what it has)")
    first = found[0]
    figure.suptitle(
        plot_text(f"{first.estimate.devices} x {first.planner.hardware.name}"), fontsize=11
    )
    write_figure(path, figure, 120)
    plt.close(figure)


def architecture_figures(one: Architecture) -> dict[str, Any]:
    """Return what is printed of an architecture, as numbers: bytes, seconds, dollars."""
    estimate = one.estimate
    return {
        "name": one.name,
        "parameters": one.planner.counts.parameters,
        "devices": estimate.devices,
        "activation_checkpointing": one.checkpointing,
        "peak_memory": estimate.peak_memory,
        "fits": one.fits,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        **run_cost(estimate, one.planner.config, one.planner.hardware),
        "range_factor": one.sure.factor,
        "range_why": one.sure.why,
    }
