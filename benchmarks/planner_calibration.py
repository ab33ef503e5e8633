"""Hold the planner against published measurements, and fit its constants on them.

    python -m benchmarks.planner_calibration [--data DIR] [--fit] [--json FILE]

prints predicted / measured for every training run and kernel of ``benchmarks/data/planner``, the
order of architectures, and memory. ``--fit`` fits the constants first, prints them as the lines of
configs/hardware, and then the errors on every source when the fit has not seen it.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.planner_fit import SOURCES, Calibration, Constants, is_fla, kernel_ratio
from benchmarks.planner_rows import DATA, MeasuredRun, read_kernels, read_runs
from pretrain.common.files import write_json
from pretrain.common.screen import plain_console, show_table, titled_table


def architecture_pairs(
    runs: Sequence[MeasuredRun], predicted: Callable[[MeasuredRun], float]
) -> list[tuple[MeasuredRun, MeasuredRun, bool]]:
    """Return pairs of different layers in one source's same setting, and whether they are ordered.

    Pairs whose measured speeds are within 3 % have no order.
    """
    groups = defaultdict(list)
    for run in runs:
        train = run.config.train
        groups[run.source, run.hardware, train.seq_len, run.devices].append(run)
    found = []
    for group in groups.values():
        for a, b in itertools.combinations(group, 2):
            if a.config.model.pattern == b.config.model.pattern:
                continue
            if a.config.model.hidden_size != b.config.model.hidden_size:
                continue
            if abs(np.log(a.tokens_per_second / b.tokens_per_second)) < 0.03:
                continue
            right = (a.tokens_per_second > b.tokens_per_second) == (predicted(a) > predicted(b))
            found.append((a, b, right))
    return found


def _summary(ratios: Sequence[float]) -> list[str]:
    """Return count, median ratio, quantiles of its logarithm's size, and share within 1.5 x."""
    values = np.array(ratios)
    sizes = np.abs(values)
    return [
        str(len(values)),
        f"{np.exp(np.median(values)):.2f}",
        f"{np.median(sizes):.3f}",
        f"{np.quantile(sizes, 0.9):.3f}",
        f"{np.quantile(sizes, 0.95):.3f}",
        f"{np.mean(sizes <= np.log(1.5)):.0%}",
    ]


_COLUMNS = ("count", "median ratio", "median |log|", "90 %", "95 %", "within 1.5 x")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planner_calibration")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the two tables")
    parser.add_argument("--fit", action="store_true", help="fit the constants, and without sources")
    parser.add_argument("--json", type=Path, help="also write every row here")
    options = parser.parse_args()
    console = plain_console(width=118)
    runs, left = read_runs(options.data / "throughput.csv")
    kernels, kernels_left = read_kernels(options.data / "kernel_times.csv")
    calibration = Calibration(runs, kernels)
    shipped = Constants(dict(SOURCES))
    calibration.choose_batches(shipped)
    constants = calibration.fit() if options.fit else shipped
    if options.fit:
        table = titled_table("fitted constants", "of", "constant", "value")
        for (where, what), value in constants.values.items():
            table.add_row(Path(where).stem, what, f"{value:.3f}")
        show_table(table, console)
    figures = _print_runs(console, calibration, constants)
    _print_kernels(console, calibration, constants)
    if options.fit:
        _print_without(console, calibration)
    _print_left(console, {**left, **kernels_left})
    if options.json:
        write_json(options.json, figures)


def _print_runs(
    console: Any, calibration: Calibration, constants: Constants
) -> list[dict[str, Any]]:
    rows = titled_table(
        "training runs",
        "id",
        "layers",
        "GPU",
        "tokens",
        "measured",
        "predicted",
        "ratio",
        "GB",
        "ratio",
    )
    figures: list[dict[str, Any]] = []
    ratios, memory = defaultdict(list), []
    for run in calibration.runs:
        estimate, _ = calibration.estimate(run, constants)
        predicted = estimate.tokens_per_second / run.devices
        ratio = float(np.log(predicted / run.tokens_per_second))
        ratios[run.kind, run.source].append(ratio)
        ratios[run.kind, "all"].append(ratio)
        if run.described:
            ratios[run.kind, "described"].append(ratio)
        config = run.config
        share = None if run.memory is None else estimate.peak_memory / run.memory
        if share is not None:
            memory.append(float(np.log(share)))
        rows.add_row(
            run.id,
            config.model.pattern[:22],
            f"{run.devices} x {Path(run.hardware).stem}",
            f"{config.parallel.micro_batch_size} x {config.train.seq_len:,}",
            f"{run.tokens_per_second:,.0f}",
            f"{predicted:,.0f}",
            f"{np.exp(ratio):.2f}",
            f"{estimate.peak_memory / 1e9:.0f}",
            "" if share is None else f"{share:.2f}",
        )
        figures.append(
            {
                "id": run.id,
                "kind": run.kind,
                "described": run.described,
                "tokens_per_second": predicted,
                "measured": run.tokens_per_second,
                "memory": estimate.peak_memory,
                "measured_memory": run.memory,
            }
        )
    show_table(rows, console)
    table = titled_table("predicted / measured", "kind", "source", *_COLUMNS)
    for (kind, source), found in sorted(ratios.items()):
        table.add_row(kind, source, *_summary(found))
    if memory:
        table.add_row("memory", "all", *_summary(memory))
    speeds = {figure["id"]: figure["tokens_per_second"] for figure in figures}
    pairs = architecture_pairs(calibration.runs, lambda run: speeds[run.id])
    show_table(table, console)
    vague = [run.id for run in calibration.runs if not run.described]
    if vague:
        console.print(
            f"{len(vague)} runs are not described: of a transformer something that matters is not "
            f"known, or of another model the micro-batch: {', '.join(vague)}"
        )
    if pairs:
        right = sum(ordered for *_, ordered in pairs)
        console.print(f"{right} of {len(pairs)} pairs of architectures in their measured order")
        for a, b, ordered in pairs:
            if not ordered:
                console.print(f"  not {a.id} and {b.id}")
    return figures


def _print_kernels(console: Any, calibration: Calibration, constants: Constants) -> None:
    ratios = defaultdict(list)
    for kernel in calibration.kernels:
        name = "fla" if is_fla(kernel) else kernel.implementation
        ratios[name, kernel.op, Path(kernel.hardware).stem].append(kernel_ratio(kernel, constants))
        ratios[name, "all", ""].append(kernel_ratio(kernel, constants))
    table = titled_table(
        "kernels, predicted as flash-linear-attention", "implementation", "op", "GPU", *_COLUMNS
    )
    for key, found in sorted(ratios.items()):
        table.add_row(*key, *_summary(found))
    show_table(table, console)


def _print_without(console: Any, calibration: Calibration) -> None:
    """Print the errors on each source when the constants were fitted without it.

    A source whose GPU no other one has is left out: nothing else says how fast it is.
    """
    table = titled_table("a source that the fit has not seen", "kind", "source", *_COLUMNS)
    ratios: dict[str, list[float]] = defaultdict(list)
    for source in sorted({run.source for run in calibration.runs}):
        others = {run.hardware for run in calibration.runs if run.source != source}
        runs = [r for r in calibration.runs if r.source == source and r.hardware in others]
        if not runs:
            continue
        constants = calibration.fit(without=source)
        for kind in sorted({run.kind for run in runs}):
            found = calibration.run_ratios(constants, [run for run in runs if run.kind == kind])
            ratios[kind] += found
            table.add_row(kind, source, *_summary(found))
    for kind, found in sorted(ratios.items()):
        table.add_row(kind, "all", *_summary(found))
    show_table(table, console)


def _print_left(console: Any, left: dict[str, str]) -> None:
    reasons = defaultdict(list)
    for name, why in left.items():
        reasons[why].append(name)
    console.print(f"{len(left)} rows are left out:")
    for why, names in sorted(reasons.items(), key=lambda item: -len(item[1])):
        console.print(f"  {len(names)} x {why}: {', '.join(names)}")


if __name__ == "__main__":
    main()
