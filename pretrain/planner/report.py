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

from pretrain.common.config_files import load_values
from pretrain.common.errors import ConfigError, UserError
from pretrain.common.files import write_json
from pretrain.common.outputs import check_file
from pretrain.common.yaml_text import quoted
from pretrain.config import RunConfig, load_run_config
from pretrain.model.build import padded_vocab_size
from pretrain.model.counts import count_model
from pretrain.model.layout import check_layout
from pretrain.planner.estimate import Planner
from pretrain.planner.figures import Estimate
from pretrain.planner.hardware import Hardware, load_hardware
from pretrain.planner.parts import model_parts
from pretrain.planner.search import Candidate, nothing_fits, search
from pretrain.planner.units import Units

# Assumed for a model without a run.
TOKENS_PER_PARAMETER = 20  # arXiv 2203.15556
ASSUMED = (
    "data.path=none",
    "schedule.warmup_steps=0",
    "train.precision=bf16",
    "train.seq_len=4096",
    "train.global_batch_tokens=1048576",
    "parallel.micro_batch_size=1",
)


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain plan",
        description="Parameters, FLOPs, memory, communication, time and cost of a run, or of a "
        "model alone, on hardware that you need not have.",
    )
    parser.add_argument("config", help="of a run, or of a model (configs/models)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--hardware", default="configs/hardware/h100.yaml", help="file (H100)")
    parser.add_argument("--devices", type=int, help="default: tensor x pipeline")
    parser.add_argument("--search", action="store_true", help="layouts that fit, fastest first")
    parser.add_argument("--top", type=int, default=10, help="how many of them to show (10)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_intermixed_args(arguments)
    if options.json:
        check_file(options.json, "--json")
    if options.top < 1:
        raise UserError(f"--top is {options.top}, expected at least 1")
    config = _load(options.config, options.overrides)
    hardware = load_hardware(options.hardware)
    devices = options.devices or config.parallel.model_size
    if devices < 1:
        raise UserError(f"--devices is {devices}, expected at least 1")
    hardware.peak_flops(config.train.precision)
    planner = Planner(config, _vocab_size(config, options.config), hardware)
    console = Console(width=118, highlight=False)
    if options.search:
        with console.status("simulating the layers"):
            found = search(planner, devices)
        _print_candidates(console, planner, found, devices, options.top)
        figures: Any = [_candidate_figures(c, planner) for c in found]
    else:
        check_layout(config, devices, options.config)
        with console.status("simulating the layers"):
            estimate = planner.estimate(config.parallel, devices)
            units = planner.units(config.parallel, config.train.activation_checkpointing)
        _print_plan(console, planner, estimate, units)
        figures = estimate_figures(estimate, planner)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, figures)
    if options.search and all(candidate.why for candidate in found):
        raise UserError(f"{options.config}: {nothing_fits(config, found, devices)}")
    return 0


def plan_run(config: RunConfig, hardware: str, devices: int, where: str) -> dict[str, Any]:
    """Return the figures of a run on ``devices`` of the hardware that a file describes.

    ``where`` begins messages. Raises UserError where the run cannot be planned or does not fit the
    number of devices.
    """
    planner = Planner(config, _vocab_size(config, where), load_hardware(hardware))
    planner.hardware.peak_flops(config.train.precision)
    check_layout(config, devices, where)
    return estimate_figures(planner.estimate(config.parallel, devices), planner)


def _load(path: str, overrides: list[str]) -> RunConfig:
    """Load a run's settings, or assume them for a model alone.

    A model is planned as a run with the settings of ``ASSUMED`` over 20 tokens per parameter.
    """
    try:
        is_model = "name" not in load_values(path)
    except ConfigError:
        is_model = False  # loading it reports what is wrong
    if not is_model or any(x.startswith("name=") for x in overrides):
        return load_run_config(path, overrides)
    assumed = [f"name={quoted(Path(path).stem)}", *ASSUMED]
    budget = any(x.startswith(("train.steps=", "train.tokens=")) for x in overrides)
    config = load_run_config(path, [*assumed, *overrides, *([] if budget else ["train.steps=1"])])
    if not budget and config.model.vocab_size is not None:
        counts = count_model(config.model, config.model.vocab_size, config.train.seq_len)
        config.train.steps = None
        config.train.tokens = TOKENS_PER_PARAMETER * counts.parameters
    return config


def _vocab_size(config: RunConfig, path: str) -> int:
    if config.model.vocab_size is not None:
        return config.model.vocab_size
    from pretrain.data.batches import open_data

    try:
        tokenizer = open_data(config.data).tokenizer
    except UserError as error:
        raise UserError(
            f"{path}: model.vocab_size is not set, and the data that determines it is missing "
            f"({error}); set model.vocab_size"
        ) from None
    return padded_vocab_size(config.model, tokenizer.vocab_size)


def estimate_figures(estimate: Estimate, planner: Planner) -> dict[str, Any]:
    """Return everything that is printed, as numbers: bytes, seconds, FLOPs."""
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
        **_cost(estimate, planner.config, planner.hardware),
    }


def _cost(estimate: Estimate, config: RunConfig, hardware: Hardware) -> dict[str, float]:
    hours = estimate.step_seconds * config.train.num_steps / 3600
    device_hours = hours * estimate.devices
    return {
        "hours": hours,
        "device_hours": device_hours,
        "kilowatt_hours": device_hours * hardware.watts * hardware.cooling / 1000,
        "dollars": device_hours * hardware.dollars_per_hour,
    }


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
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _print_plan(console: Console, planner: Planner, estimate: Estimate, units: Units) -> None:
    config, hardware, parallel = planner.config, planner.hardware, estimate.parallel
    train, counts = config.train, planner.counts
    console.print(
        f"[bold]{config.name}[/bold]: {counts.parameters:,} parameters, "
        f"{train.num_steps:,} steps of {train.global_batch_tokens:,} tokens "
        f"({_short_count(train.tokens_before(train.num_steps))}) in sequences of "
        f"{train.seq_len:,}, {train.precision}, "
        f"{parallel.describe(estimate.devices, 'device')} of "
        f"{hardware.name}\n"
    )
    console.print(_parts_table(planner, estimate, units))
    console.print(_memory_table(estimate, hardware))
    console.print(_time_table(estimate))
    cost = _cost(estimate, config, hardware)
    days = (
        f"{cost['hours'] / 24:,.2f} days" if cost["hours"] >= 48 else f"{cost['hours']:,.2f} hours"
    )
    console.print(
        f"{estimate.tokens_per_second:,.0f} tokens/s, {estimate.mfu:.1%} of the dense "
        f"{train.precision} peak for the model's FLOPs"
        + (f", {estimate.hfu:.1%} with recomputation" if estimate.hfu > 1.01 * estimate.mfu else "")
        + f"\n{days}, {cost['device_hours']:,.4g} device-hours, "
        f"{cost['kilowatt_hours']:,.4g} kWh, ${cost['dollars']:,.4g}"
    )
    for line in _remarks(planner, estimate):
        console.print(f"note: {line}")


def _short_count(number: float) -> str:
    return f"{number / 1e9:,.1f}B" if number >= 1e8 else f"{number / 1e6:,.2f}M"


def _remarks(planner: Planner, estimate: Estimate) -> list[str]:
    limit, remarks = planner.hardware.memory_bytes, []
    if estimate.peak_memory > limit:
        remarks.append(
            f"does not fit: {estimate.peak_memory / 1e9:,.1f} GB per device of {limit / 1e9:,.1f} "
            "GB; --search shows what does"
        )
    if planner.hardware.device == "cuda":
        remarks.append(
            "the layers are counted as torch operations one by one, attention as one fused kernel; "
            "fused kernels for recurrences need less time and memory"
        )
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
    parts = model_parts(config, planner.vocab_size, seq_len)
    for part, unit in zip(parts, units.each(), strict=True):
        number = part.number
        through = f"{number}" if part.used == number else f"{number} x {part.used / number:g}"
        backward = unit.backward.flops * estimate.parallel.tensor / tokens
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
        days = _cost(estimate, planner.config, planner.hardware)["hours"] / 24
        table.add_row(
            _short(candidate.parallel, devices),
            str(candidate.parallel.micro_batch_size),
            candidate.checkpointing,
            f"{estimate.peak_memory / 1e9:,.1f}",
            f"{estimate.step_seconds:,.2f}",
            f"{estimate.tokens_per_second:,.0f}",
            f"{estimate.mfu:.1%}",
            f"{estimate.seconds['pipeline bubble'] / estimate.step_seconds:.0%}",
            f"{days:,.1f}",
        )
    console.print(table)
    if fits:
        best = fits[0]
        console.print(f"fastest: {_settings(best)}\n")
    too_large = [c for c in found if c.why and c.estimate is not None]
    if too_large:
        console.print(f"[bold]{len(too_large)} do not fit in memory[/bold], the nearest:")
        nearest = sorted(too_large, key=lambda c: c.estimate.peak_memory if c.estimate else 0.0)
        for candidate in nearest[:5]:
            console.print(
                f"  {_short(candidate.parallel, devices)}, micro batch "
                f"{candidate.parallel.micro_batch_size}, ckpt {candidate.checkpointing}: "
                f"{candidate.why}"
            )
    impossible = Counter(c.why for c in found if c.estimate is None)
    if impossible:
        console.print(f"[bold]{sum(impossible.values())} are not possible[/bold]:")
        for why, number in impossible.most_common(6):
            console.print(f"  {number} x {why}")


def _short(parallel: Any, devices: int) -> str:
    data = devices // parallel.model_size
    parts = [
        f"TP{parallel.tensor}" * (parallel.tensor > 1),
        f"EP{parallel.expert}" * (parallel.expert > 1),
        f"PP{parallel.pipeline}" * (parallel.pipeline > 1),
        f"VPP{parallel.virtual_pipeline}" * (parallel.virtual_pipeline > 1),
        f"DP{data}" * (data > 1),
        f"ZeRO-{parallel.zero_stage}" * (data > 1),
    ]
    return " ".join(p for p in parts if p) or "one device"


def _settings(candidate: Candidate) -> str:
    """Return a candidate as overrides of the command line."""
    parallel = candidate.parallel
    chosen = {
        "tensor": parallel.tensor,
        "sequence": str(parallel.sequence).lower(),
        "expert": parallel.expert,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "micro_batch_size": parallel.micro_batch_size,
        "zero_stage": parallel.zero_stage,
        "zero_backend": parallel.zero_backend,
    }
    words = [f"parallel.{name}={value}" for name, value in chosen.items()]
    return " ".join([*words, f"train.activation_checkpointing={candidate.checkpointing}"])
