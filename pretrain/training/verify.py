"""``python -m pretrain verify CONFIG``: does a layout of processes train the same model as one?

Trains a few steps three times with the real command, in a temporary folder: on one process; under
the configured layout; and under it again, resumed from the checkpoint halfway. Losses, gradient
norms and final weights are compared and printed.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig, RunConfig, load_run_config, to_yaml
from pretrain.model.layout import check_layout
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.run_directory import RunDirectory, checkpoint_name, find_checkpoint

# Relative, for the first step's loss and gradient norm: float32 sums in another order, bf16 rounds.
TOLERANCE = {"float32": 1e-5, "bf16": 2e-2}
# Later steps may be further apart: Adam turns a rounding error in a tiny gradient into a step.
GROWTH = {"float32": 100, "bf16": 5}
EXIT_DIFFERENT = 4


@dataclass
class Comparison:
    """The largest relative differences between two runs.

    Attributes:
        first: In loss and gradient norm of the first step compared.
        all_steps: The same over all steps.
        weights: In the final weights.
    """

    name: str
    first: float
    all_steps: float
    weights: float

    def within(self, tolerance: float, growth: float) -> bool:
        """Return whether the runs are equal up to rounding; never where a number is not finite."""
        numbers = (self.first, self.all_steps, self.weights)
        limits = (tolerance, growth * tolerance, growth * tolerance)
        return all(x <= limit for x, limit in zip(numbers, limits, strict=True))


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status, 0 or 4 where a run is different."""
    parser = argparse.ArgumentParser(prog="python -m pretrain verify", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps, an even number (4)")
    parser.add_argument("--processes", type=int, help="of the layout (2 x tensor x pipeline)")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 2 or options.steps % 2:
        raise UserError(f"--steps is {options.steps}, expected an even number from 2")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}, expected at least 1")
    config = load_run_config(options.config, options.overrides)
    processes = options.processes or 2 * config.parallel.model_size
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        return _verify(config, options.config, Path(folder), options.steps, processes)


def _verify(config: RunConfig, path: str, folder: Path, steps: int, processes: int) -> int:
    config.train.steps, config.train.tokens = steps, None
    # Settings that fit a run of so few steps and its few checkpoints.
    flat = int(steps * (1 - config.schedule.decay_fraction))
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, steps // 2, flat)
    config.train.spikes.policy = "none"
    config.eval.tasks, config.callbacks = [], []
    config.logging.wandb, config.logging.tensorboard = "disabled", False
    config.logging.every, config.sample.tokens, config.validation.every = 1, 0, 0
    config.validation.tokens, config.checkpoint.resume = 1, None
    config.checkpoint.every, config.checkpoint.keep_last = steps // 2, 2
    check_layout(config, processes, path)
    wanted = config.parallel
    config.parallel = ParallelConfig(
        micro_batch_size=wanted.micro_batch_size, zero_stage=min(wanted.zero_stage, 1)
    )
    one = _train(config, folder / "one", 1)
    config.parallel = wanted
    layout = _train(config, folder / "layout", processes)
    resumed = folder / "resumed"
    saved, copied = (
        RunDirectory(run).checkpoints / checkpoint_name(steps // 2) for run in (layout, resumed)
    )
    shutil.copytree(saved, copied)
    _train(config, resumed, processes)

    start_processes()
    results = [
        _compare(_describe(wanted, processes), one, layout, 0),
        _compare(f"the same, resumed at step {steps // 2}", layout, resumed, steps // 2),
    ]
    stop_processes()
    tolerance, growth = TOLERANCE[config.train.precision], GROWTH[config.train.precision]
    title = f"{config.name}: largest relative differences in loss and gradient norm, {steps} steps"
    table = Table(title=title, title_justify="left")
    for column in ("run", "first step", "all steps", "final weights", ""):
        table.add_column(column)
    for result, against in zip(results, ("one process", "uninterrupted"), strict=True):
        numbers = (f"{x:.1e}" for x in (result.first, result.all_steps, result.weights))
        verdict = "equal" if result.within(tolerance, growth) else "DIFFERENT"
        table.add_row(f"{result.name}, against {against}", *numbers, verdict)
    Console(width=120).print(table)
    print(
        f"equal in {config.train.precision}: the first step within {tolerance:.0e}, the rest "
        f"within {growth * tolerance:.0e}"
    )
    return 0 if all(r.within(tolerance, growth) for r in results) else EXIT_DIFFERENT


def _describe(parallel: ParallelConfig, processes: int) -> str:
    kind = f"{parallel.zero_backend} ZeRO-{parallel.zero_stage}"
    return f"{parallel.describe(processes)}, {kind}"


def _train(config: RunConfig, directory: Path, processes: int) -> Path:
    directory.mkdir(exist_ok=True)
    config.directory = str(directory)
    path = directory.with_suffix(".yaml")
    path.write_text(to_yaml(config))
    launcher = ["-m", "pretrain.parallel.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "pretrain", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
        raise UserError(
            f"training on {processes} process{'es' * (processes > 1)} failed with status "
            f"{done.returncode}: {errors[0].removeprefix('error: ') if errors else done.stderr}"
        )
    return directory


def _compare(name: str, expected: Path, found: Path, first_step: int) -> Comparison:
    rows, wanted = _metrics(found), _metrics(expected)
    steps = [step for step in wanted if step > first_step]
    if sorted(s for s in rows if s > first_step) != sorted(steps):
        raise UserError(f"{name}: some steps were not finite and skipped; nothing to compare")
    differences = [
        _largest(rows[s][key] / wanted[s][key] - 1 for key in ("loss", "grad_norm")) for s in steps
    ]
    a, b = _weights(expected), _weights(found)
    weights = _largest(float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-30)) for n in a)
    return Comparison(name, differences[0], _largest(differences), weights)


def _largest(numbers: Iterable[float]) -> float:
    """Return the largest absolute value; infinity where a number is not finite."""
    return max(abs(x) if math.isfinite(x) else math.inf for x in numbers)


def _metrics(directory: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in RunDirectory(directory).read_metrics() if "loss" in row}


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    from pretrain.checkpoint.state import load_weights, read_state
    from pretrain.model.build import build_model

    checkpoint = find_checkpoint(directory)
    state = read_state(checkpoint)
    model = build_model(state.model_config, state.vocab_size, seed=0)
    load_weights(checkpoint, model)
    return {name: p.detach().float() for name, p in model.named_parameters()}
