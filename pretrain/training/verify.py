"""``python -m pretrain verify CONFIG``: does a layout of processes train the same model as one?

Trains a few steps three times with the real command, in a temporary folder: on one process; under
the configured layout; and under it again, resumed from the checkpoint halfway. Losses, gradient
norms and final weights are compared and printed. A run in phases does a few steps of each.
"""

from __future__ import annotations

import argparse
import dataclasses
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

from torch import Tensor

from pretrain.checkpoint_folders import checkpoint_name
from pretrain.common.errors import UserError
from pretrain.common.screen import show_table, titled_table
from pretrain.config import ParallelConfig, RunConfig, load_run_config, to_yaml
from pretrain.config.schedule import fraction_of_steps
from pretrain.model.layout import check_layout
from pretrain.parallel.processes import start_processes, stop_processes
from pretrain.run_directory import RunDirectory, find_checkpoint

EXIT_DIFFERENT = 4
Tensors = dict[str, Tensor]  # by name


@dataclass(frozen=True)
class Limits:
    """The differences up to which two runs are equal.

    Attributes:
        first: Relative, in the first step's loss and gradient norm: float32 sums in another order,
            bf16 rounds.
        later: Relative, in later steps and the final weights. Adam turns a rounding error in a tiny
            gradient into a step.
        moves: Share of the moves of experts' biases. Where an expert has as many tokens as the
            others, one token more or less turns its bias round.
    """

    first: float
    later: float
    moves: float


LIMITS = {"float32": Limits(1e-5, 1e-3, 0.05), "bf16": Limits(2e-2, 1e-1, 0.25)}
LIMITS["fp8"] = LIMITS["bf16"]
# What began at zero is as small as its steps, some of which rounding turns round: differences are
# relative to no less than so many times the largest sum of steps.
_STEPS_IN_SCALE = 5


@dataclass
class Comparison:
    """The largest differences between two runs.

    Attributes:
        first: Relative, in loss and gradient norm of the first step compared.
        all_steps: The same over all steps.
        weights: In the final weights, see :func:`largest_difference`.
        moves_apart: Moves of experts' biases that went the other way, at the least.
        moves: All moves of experts' biases, 0 where they have none.
    """

    name: str
    first: float
    all_steps: float
    weights: float
    moves_apart: float = 0.0
    moves: int = 0

    def within(self, limits: Limits) -> bool:
        """Return whether the runs are equal up to rounding; never where a number is not finite."""
        numbers = (self.first, self.all_steps, self.weights, self.moves_apart)
        at_most = (limits.first, limits.later, limits.later, max(1, limits.moves * self.moves))
        return all(x <= limit for x, limit in zip(numbers, at_most, strict=True))


def main(arguments: list[str]) -> int:
    """Run the command; return its exit status, 0 or 4 where a run is different."""
    parser = argparse.ArgumentParser(prog="python -m pretrain verify", description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument(
        "--steps",
        type=int,
        default=4,
        help="optimizer steps, an even number (4); phases share them, each has one at least",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="of the layout (2 x tensor x pipeline x context, or half for small batches)",
    )
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 2 or options.steps % 2:
        raise UserError(f"--steps is {options.steps}, expected an even number from 2")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}, expected at least 1")
    config = load_run_config(options.config, options.overrides)
    processes = options.processes or default_processes(config)
    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        return _verify(config, options.config, Path(folder), options.steps, processes)


def default_processes(config: RunConfig) -> int:
    """Return two replicas' processes, or one's where a batch is no multiple of two's."""
    size = config.parallel.model_size
    divides = all(
        c.train.global_batch_tokens % (2 * c.train.seq_len * c.parallel.micro_batch_size) == 0
        for c in (config, *(phase.config for phase in config.plan.phases))
    )
    return 2 * size if size == 1 or divides else size


def shorten(config: RunConfig, steps: int) -> int:
    """Make a run's settings those of ``steps`` steps, or of somewhat more where phases share them.

    Every phase has equally many, and the number of all is even. Returns that.
    """
    train, first = config.train, steps
    if config.phases:
        batches = [phase.config.train.global_batch_tokens for phase in config.plan.phases]
        each = max(steps // len(batches), 1)
        each += each * len(batches) % 2
        steps, done = each * len(batches), 0
        for phase, batch in zip(config.phases, batches, strict=True):
            done += each * batch
            phase.until, phase.until_tokens = None, done
            if phase.schedule is not None:
                phase.schedule.warmup_steps = 0
        train.steps, train.tokens = None, done
        train.batch_warmup_steps, train.batch_warmup_start = 0, None
        own = [number for number, phase in enumerate(config.phases) if phase.schedule is not None]
        first = each * own[0] if own else steps
    else:
        train.steps, train.tokens = steps, None
    flat = int(first - fraction_of_steps(config.schedule.decay_fraction, first))
    config.schedule.warmup_steps = min(config.schedule.warmup_steps, first // 2, flat)
    return steps


def _verify(config: RunConfig, path: str, folder: Path, steps: int, processes: int) -> int:
    steps = shorten(config, steps)
    # Settings that fit a run of so few steps and its few checkpoints.
    config.train.spikes.policy = "none"
    config.eval.tasks, config.callbacks = [], []
    config.logging.wandb, config.logging.tensorboard = "disabled", False
    config.logging.blocks = 0
    config.logging.every, config.sample.tokens, config.validation.every = 1, 0, 0
    config.validation.tokens, config.checkpoint.resume = 1, None
    config.checkpoint.every, config.checkpoint.keep_last = steps // 2, 2
    config.checkpoint.keep, config.branch = [], None
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
    limits = LIMITS[config.train.precision]
    if config.optimizer.kind == "muon":  # which orthogonalises in bf16
        limits = dataclasses.replace(limits, later=max(limits.later, LIMITS["bf16"].first))
    phases = f" of {len(config.phases)} phases" if config.phases else ""
    print_table(
        f"{config.name}: largest relative differences in loss and gradient norm, {steps} steps"
        + phases,
        dict(zip(("one process", "uninterrupted"), results, strict=True)),
        limits,
    )
    print(
        f"equal in {config.train.precision}: the first step within {limits.first:.0e}, the rest "
        f"within {limits.later:.0e}"
    )
    if results[0].moves:
        print(
            "expert biases: their moves by bias_update_rate that went the other way; equal within "
            f"{limits.moves:.0%} of them"
        )
    return 0 if all(r.within(limits) for r in results) else EXIT_DIFFERENT


def print_table(title: str, results: dict[str, Comparison], limits: Limits) -> None:
    """Print comparisons by what was compared against."""
    biases = any(result.moves for result in results.values())
    names = ("first step", "all steps", "final weights", *(["expert biases"] if biases else []))
    table = titled_table(title, "run", *names, "verdict")
    for against, result in results.items():
        numbers = [f"{x:.1e}" for x in (result.first, result.all_steps, result.weights)]
        if biases:
            numbers.append(f"{result.moves_apart:g}/{result.moves:,}")
        verdict = "equal" if result.within(limits) else "DIFFERENT"
        table.add_row(f"{result.name}, against {against}", *numbers, verdict)
    show_table(table)


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
    a, b = _load(expected), _load(found)
    moved = sum(row["lr"] for row in wanted.values())
    weights = largest_difference(a.weights, b.weights, moved)
    moves = a.updates * sum(bias.numel() for bias in a.biases.values())
    apart = moves_apart(a.biases, b.biases, a.rate)
    return Comparison(name, differences[0], _largest(differences), weights, apart, moves)


def largest_difference(a: Tensors, b: Tensors, moved: float) -> float:
    """Return the largest relative difference between tensors of one name, by their norms.

    That is relative to a's norm, or where that is near zero to a multiple of ``moved``, the sum of
    the learning rates: the most that Adam can have moved an element.
    """
    return _largest(
        float((x - b[name]).norm())
        / max(float(x.norm()), _STEPS_IN_SCALE * moved * x.numel() ** 0.5, 1e-30)
        for name, x in a.items()
    )


def moves_apart(a: Tensors, b: Tensors, rate: float) -> float:
    """Return how many moves by ``rate``, up or down, went the other way, at the least."""
    return sum(float((x - b[name]).abs().sum()) / (2 * rate) for name, x in a.items())


def _largest(numbers: Iterable[float]) -> float:
    """Return the largest absolute value; infinity where a number is not finite."""
    return max(abs(x) if math.isfinite(x) else math.inf for x in numbers)


def _metrics(directory: Path) -> dict[int, dict[str, Any]]:
    return {row["step"]: row for row in RunDirectory(directory).read_metrics() if "loss" in row}


@dataclass(frozen=True)
class _Trained:
    """A checkpoint's weights, the biases of its experts, and how often those were moved by rate."""

    weights: Tensors
    biases: Tensors
    rate: float
    updates: int


def _load(directory: Path) -> _Trained:
    from pretrain.checkpoint.state import load_weights, read_state
    from pretrain.model.build import build_model

    checkpoint = find_checkpoint(directory)
    state = read_state(checkpoint)
    model = build_model(state.model_config, state.vocab_size, seed=0)
    load_weights(checkpoint, model)
    tensors = {name: p.detach().float() for name, p in model.named_parameters()}
    biases = {
        name: tensors.pop(name) for name, p in model.named_parameters() if not p.requires_grad
    }
    moe = state.model_config.moe
    rate = 0.0 if moe is None else moe.bias_update_rate
    return _Trained(tensors, biases, rate, state.step - state.skipped)
