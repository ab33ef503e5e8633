"""Hold plans of runs in fp8 against published ones; no constant is fitted on them.

    python -m benchmarks.planner_float8

Runs by torchtitan have torchao's float8 with a scale per tensor, as ``train.precision: fp8`` has.
The others are Transformer Engine's, with scales from earlier steps and casts inside other kernels,
and show how much that matters: a plan is of this project's casts.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from benchmarks.planner_fit import SOURCES, Calibration, Constants
from benchmarks.planner_rows import MeasuredRun, read_runs
from pretrain.common.screen import plain_console, show_table, titled_table

TORCHAO = ("titan",)


def planned_speed(run: MeasuredRun, precision: Literal["bf16", "fp8"]) -> float:
    """Return the planned tokens per second of each GPU."""
    train = dataclasses.replace(run.config.train, precision=precision)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, train=train))
    estimate, _ = Calibration([], []).estimate(run, Constants(dict(SOURCES)))
    return estimate.tokens_per_second / run.devices


def main() -> None:
    """Print the tables."""
    runs, _ = read_runs(precision="fp8")
    for title, chosen in (
        ("torchao, a scale per tensor", [run for run in runs if run.source in TORCHAO]),
        ("Transformer Engine", [run for run in runs if run.source not in TORCHAO]),
    ):
        table = titled_table(
            f"{title}: tokens/s of a GPU",
            *("id", "GPUs", "tokens", "measured", "planned", "ratio", "planned in bf16"),
        )
        for run in chosen:
            config, planned = run.config, planned_speed(run, "fp8")
            table.add_row(
                run.id,
                f"{run.devices} x {Path(run.hardware).stem}",
                f"{config.parallel.micro_batch_size} x {config.train.seq_len:,}",
                f"{run.tokens_per_second:,.0f}",
                f"{planned:,.0f}",
                f"{planned / run.tokens_per_second:.2f}",
                f"{planned_speed(run, 'bf16'):,.0f}",
            )
        show_table(table, plain_console(width=100))


if __name__ == "__main__":
    main()
