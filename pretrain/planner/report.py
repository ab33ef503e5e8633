"""The command ``python -m pretrain plan CONFIG``: the needs and the cost of a run.

Nothing is started or allocated: the layers run on tensors without values, so any model fits this
machine.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pretrain.common.errors import UserError
from pretrain.common.files import write_json
from pretrain.common.outputs import check_file
from pretrain.common.screen import plain_console, show_table, titled_table
from pretrain.config import RunConfig
from pretrain.model.layout import check_layout
from pretrain.planner.comparison import (
    architecture_figures,
    draw_architectures,
    plan_architectures,
    print_architectures,
)
from pretrain.planner.cost_of_run import run_cost
from pretrain.planner.estimate import Planner, has_cells
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware, load_hardware
from pretrain.planner.parts import model_parts
from pretrain.planner.phases import PlannedPhase, phase_figures, phases_table, planned_phases
from pretrain.planner.planned_run import (
    assumes_checkpointing,
    choose_checkpointing,
    load_planned,
    planned_vocab_size,
)
from pretrain.planner.search import Candidate, nothing_fits, search
from pretrain.planner.uncertainty import Uncertainty, uncertainty, with_range
from pretrain.planner.units import Units


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain plan",
        description="Parameters, FLOPs, memory, communication, time and cost of a run, or of a "
        "model alone, on hardware that you need not have.",
    )
    parser.add_argument("config", help="of a run, or of a model (configs/models, or 7b/rat)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hardware", default="h100", help="file, or a name of configs/hardware")
    parser.add_argument("--devices", type=int, help="default: tensor x pipeline x context")
    parser.add_argument("--search", action="store_true", help="layouts that fit, fastest first")
    parser.add_argument("--top", type=int, default=10, help="how many of them to show (10)")
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="CONFIG",
        default=[],
        help="other architectures beside the first, on the same hardware and budget",
    )
    parser.add_argument("--plot", type=Path, help="with --compare: also draw a picture here (png)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_intermixed_args(arguments)
    if options.json:
        check_file(options.json, "--json")
    if options.plot:
        check_file(options.plot, "--plot")
        if options.plot.suffix not in (".png", ".pdf", ".svg"):
            raise UserError(f"--plot is {options.plot}, expected a file that ends in .png")
        if not options.compare:
            raise UserError("--plot draws a comparison; expected --compare CONFIG ... with it")
    if options.top < 1:
        raise UserError(f"--top is {options.top}, expected at least 1")
    if options.devices is not None and options.devices < 1:
        raise UserError(f"--devices is {options.devices}, expected at least 1")
    hardware = load_hardware(options.hardware)
    if options.compare:
        paths = [options.config, *options.compare]
        return _compare(paths, hardware, options)
    config = load_planned(options.config, options.overrides)
    devices = options.devices or config.parallel.model_size
    hardware.peak_flops(config.train.precision)
    planner = Planner(config, planned_vocab_size(config, options.config), hardware)
    console = plain_console(width=118)
    if options.search:
        with console.status("simulating the layers"):
            found = search(planner, devices)
        _print_candidates(console, planner, found, devices, options.top)
        figures: Any = [_candidate_figures(c, planner) for c in found]
    else:
        check_layout(config, devices, options.config)
        with console.status("simulating the layers"):
            if assumes_checkpointing(options.config, options.overrides):
                choose_checkpointing(planner, devices)
            estimate = planner.estimate(config.parallel, devices)
            units = planner.units(estimate.parallel, config.train.activation_checkpointing)
        _print_plan(console, planner, estimate, units)
        figures = estimate_figures(estimate, planner)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, figures)
    if options.search and all(candidate.why for candidate in found):
        raise UserError(f"{options.config}: {nothing_fits(config, found, devices)}")
    return 0


def _compare(paths: list[str], hardware: Hardware, options: argparse.Namespace) -> int:
    console = plain_console(width=118)
    with console.status("simulating the layers"):
        found = plan_architectures(
            paths, options.overrides, hardware, options.devices, best_layout=options.search
        )
    print_architectures(console, found)
    if options.plot:
        options.plot.parent.mkdir(parents=True, exist_ok=True)
        draw_architectures(options.plot, found)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, [architecture_figures(one) for one in found])
    return 0


def plan_run(config: RunConfig, hardware: str, devices: int, where: str) -> dict[str, Any]:
    """Return the figures of a run on ``devices`` of the hardware that a file describes.

    ``where`` begins messages. Raises UserError where the run cannot be planned or does not fit the
    number of devices.
    """
    planner = Planner(config, planned_vocab_size(config, where), load_hardware(hardware))
    planner.hardware.peak_flops(config.train.precision)
    check_layout(config, devices, where)
    return estimate_figures(planner.estimate(config.parallel, devices), planner)


def estimate_figures(estimate: Estimate, planner: Planner) -> dict[str, Any]:
    """Return everything that is printed, as numbers: bytes, seconds, FLOPs."""
    phases = planned_phases(planner, estimate)
    return {
        "parallel": dataclasses.asdict(estimate.parallel),
        "devices": estimate.devices,
        "parameters": planner.counts.parameters,
        "memory": [{**s.memory, "total": s.peak} for s in estimate.stages],
        "memory_limit": planner.hardware.memory_bytes,
        "seconds": estimate.seconds,
        "step_seconds": estimate.step_seconds,
        "bytes_sent": estimate.sent,
        "tokens_per_second": estimate.tokens_per_second,
        "mfu": estimate.mfu,
        "hfu": estimate.hfu,
        **({"phases": phase_figures(phases)} if phases else {}),
        **run_cost(estimate, planner.config, planner.hardware, phases),
        "range_factor": (sure := _uncertainty(planner, estimate)).factor,
        "range_why": sure.why,
    }


def _uncertainty(planner: Planner, estimate: Estimate) -> Uncertainty:
    return uncertainty(planner.config, planner.hardware, estimate.parallel.context)


def _candidate_figures(candidate: Candidate, planner: Planner) -> dict[str, Any]:
    found: dict[str, Any] = {
        "parallel": dataclasses.asdict(candidate.parallel),
        "activation_checkpointing": candidate.checkpointing,
        "why_not": candidate.why or None,
    }
    if candidate.estimate is not None:
        found.update(estimate_figures(candidate.estimate, planner))
    return found


def _table(title: str, first: str, *columns: str) -> Table:
    table = titled_table(title, first, *columns)
    table.title_style = "bold"
    return table


def _print_plan(console: Console, planner: Planner, estimate: Estimate, units: Units) -> None:
    config, hardware, parallel = planner.config, planner.hardware, estimate.parallel
    train, counts, plan = config.train, planner.counts, config.plan
    total, phases = _short_count(plan.tokens), planned_phases(planner, estimate)
    sizes = (
        f" ({total} tokens) in {len(phases)} phases; what follows is of the run's own settings"
        if phases
        else f" of {train.global_batch_tokens:,} tokens ({total}) in sequences of {train.seq_len:,}"
    )
    console.print(
        f"{config.name}: {counts.describe()}, "
        f"{plan.num_steps:,} steps{sizes}, {train.precision}, "
        f"{parallel.describe(estimate.devices, 'device')} of "
        f"{hardware.name}\n"
    )
    show_table(_parts_table(planner, estimate, units), console)
    show_table(_memory_table(estimate, hardware), console)
    show_table(_time_table(estimate), console)
    if phases:
        show_table(phases_table(phases), console)
    cost, sure = run_cost(estimate, config, hardware, phases), _uncertainty(planner, estimate)
    unit, hours = ("days", 24.0) if cost["hours"] >= 48 else ("hours", 1.0)
    console.print(
        f"{with_range(estimate.tokens_per_second, sure)} tokens/s, {estimate.mfu:.1%} of the dense "
        f"{train.precision} peak for the model's FLOPs"
        + (f", {estimate.hfu:.1%} with recomputation" if estimate.hfu > 1.01 * estimate.mfu else "")
        + f"\n{with_range(cost['hours'] / hours, sure)} {unit}, "
        f"{with_range(cost['device_hours'], sure)} device-hours, "
        f"{with_range(cost['kilowatt_hours'], sure)} kWh, ${with_range(cost['dollars'], sure)}"
    )
    for line in _remarks(planner, estimate, phases):
        console.print(f"note: {line}")


def _short_count(number: float) -> str:
    return f"{number / 1e9:,.1f}B" if number >= 1e8 else f"{number / 1e6:,.2f}M"


def _remarks(planner: Planner, estimate: Estimate, phases: list[PlannedPhase]) -> list[str]:
    limit, remarks = planner.hardware.memory_bytes, []
    remarks += [
        f"{phase.name} does not fit: {step.peak_memory / 1e9:,.1f} GB per device of "
        f"{limit / 1e9:,.1f} GB; expected a smaller phases[{phase.number - 1}].micro_batch_size"
        for phase, step, _ in phases
        if step.peak_memory > limit
    ]
    if estimate.peak_memory > limit:
        remarks.append(
            f"does not fit: {estimate.peak_memory / 1e9:,.1f} GB per device of {limit / 1e9:,.1f} "
            "GB; --search shows what does"
        )
    parallel = estimate.parallel
    if parallel.context > 1 and has_cells(planner.config.model):
        remarks.append(
            "sequential cells are computed "
            + ("over heads" if parallel.context_cells == "heads" else "one segment after another")
            + f" (parallel.context_cells={parallel.context_cells})"
        )
    sure = _uncertainty(planner, estimate)
    remarks.append(sure.why if sure.factor else f"speed, days and cost have no range: {sure.why}")
    return remarks


def _parts_table(planner: Planner, estimate: Estimate, units: Units) -> Table:
    """Return the table of the full model, and of a micro-batch's activations on one process."""
    table = _table(
        "model by part",
        "part",
        "number",
        "parameters each",
        "together",
        "forward MFLOP/token each",
        "backward",
        "kept for backward, MB each",
    )
    config, seq_len = planner.config.model, planner.config.train.seq_len
    tokens = seq_len * estimate.parallel.micro_batch_size
    sharing = estimate.parallel.tensor * estimate.parallel.context
    parts = model_parts(config, planner.vocab_size, seq_len, units.kinds)
    for part, unit in zip(parts, units.each(), strict=True):
        number = part.number
        through = f"{number}" if part.used in (0, number) else f"{number} x {part.used / number:g}"
        backward = unit.backward.flops * sharing / tokens
        table.add_row(
            part.name,
            through,
            f"{part.parameters:,}",
            f"{number * part.parameters:,}",
            f"{part.flops / 1e6:,.2f}",
            f"{backward / 1e6:,.2f}",
            f"{unit.forward.kept / 1e6:,.1f}",
        )
    return table


def _memory_table(estimate: Estimate, hardware: Hardware) -> Table:
    limit = hardware.memory_bytes / 1e9
    kinds = [k for k in estimate.stages[0].memory if any(s.memory.get(k) for s in estimate.stages)]
    kinds += [k for s in estimate.stages for k in s.memory if k not in kinds and s.memory[k]]
    kinds = list(dict.fromkeys(kinds))
    table = _table(
        f"memory per device, GB of {limit:,.1f}", "stage", "blocks", "parameters", *kinds, "peak"
    )
    for number, stage in enumerate(estimate.stages):
        blocks = ", ".join(f"{b.start}-{b.stop - 1}" if len(b) else "head" for b in stage.blocks)
        table.add_row(
            str(number),
            blocks,
            f"{stage.parameters + stage.expert_parameters:,}",
            *(f"{stage.memory.get(kind, 0.0) / 1e9:,.2f}" for kind in kinds),
            f"{stage.peak / 1e9:,.2f}",
        )
    return table


def _time_table(estimate: Estimate) -> Table:
    table = _table(
        f"a step: {estimate.step_seconds:,.3f} s, {estimate.micro_batches} micro-batches per "
        "process",
        "part",
        "seconds",
        "share",
        "sent per process, MB",
    )
    sent = dict(estimate.sent)
    sent["pipeline messages"] = sent.pop("pipeline")
    for part, seconds in estimate.seconds.items():
        if seconds or sent.get(part):
            moved = sent.get(part)
            table.add_row(
                part,
                f"{seconds:,.4f}",
                f"{seconds / estimate.step_seconds:.1%}",
                "" if moved is None else f"{moved / 1e6:,.1f}",
            )
    return table


def _print_candidates(
    console: Console, planner: Planner, found: list[Candidate], devices: int, top: int
) -> None:
    fits = [c for c in found if not c.why]
    table = _table(
        f"{planner.config.name} on {devices} x {planner.hardware.name}: {len(fits)} of "
        f"{len(found)} layouts fit, fastest first",
        "layout",
        "micro batch",
        "ckpt",
        "GB",
        "s/step",
        "tokens/s",
        "MFU",
        "bubble",
        "days",
    )
    for candidate in fits[:top]:
        estimate = candidate.estimate
        assert estimate is not None
        days = run_cost(estimate, planner.config, planner.hardware)["hours"] / 24
        table.add_row(
            candidate.describe(devices),
            str(candidate.parallel.micro_batch_size),
            candidate.checkpointing,
            f"{estimate.peak_memory / 1e9:,.1f}",
            f"{estimate.step_seconds:,.2f}",
            f"{estimate.tokens_per_second:,.0f}",
            f"{estimate.mfu:.1%}",
            f"{estimate.seconds['pipeline bubble'] / estimate.step_seconds:.0%}",
            f"{days:,.1f}",
        )
    show_table(table, console)
    if fits:
        best = fits[0]
        console.print(f"fastest: {best.settings()}\n")
        assert best.estimate is not None
        sure = _uncertainty(planner, best.estimate)
        if sure.factor is None:
            console.print(f"note: speeds and days have no range: {sure.why}\n")
        else:
            ends = [sure.low(1.0), sure.high(1.0)]
            console.print(
                f"note: speeds and days are within {ends[0]:.2f} to {ends[1]:.2f} times these: "
                f"{sure.why}; the order of layouts is surer than that\n"
            )
    too_large = [c for c in found if c.why and c.estimate is not None]
    if too_large:
        console.print(f"{len(too_large)} do not fit in memory, the nearest:")
        nearest = sorted(too_large, key=lambda c: c.estimate.peak_memory if c.estimate else 0.0)
        for candidate in nearest[:5]:
            console.print(
                f"  {candidate.describe(devices)}, micro batch "
                f"{candidate.parallel.micro_batch_size}, ckpt {candidate.checkpointing}: "
                f"{candidate.why}"
            )
    impossible = Counter(c.why for c in found if c.estimate is None)
    if impossible:
        console.print(f"{sum(impossible.values())} are not possible:")
        for why, number in impossible.most_common(6):
            console.print(f"  {number} x {why}")
