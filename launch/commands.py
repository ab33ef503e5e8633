"""The commands ``python -m launch status``, ``cancel``, ``logs`` and ``measure``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch import throughput
from launch.expansion import load_grid
from launch.grid import Grid
from launch.matching import counts_of
from launch.members import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    STOPPED,
    MemberState,
    member_state,
)
from launch.slurm import cancel as cancel_jobs
from launch.slurm import queue_states
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory


def status(arguments: Sequence[str]) -> int:
    """Show the progress of a grid's members, once or until all have ended."""
    parser = _parser("status", "Show the progress of a run, or of a grid's members.")
    parser.add_argument("--watch", action="store_true", help="update until all have ended")
    options = parser.parse_intermixed_args(arguments)
    grid, states = load(options.config, options.overrides)
    console = console_of()
    if not options.watch:
        console.print(table(grid, states))
        return 0
    with Live(table(grid, states), console=console, refresh_per_second=1) as live:
        while any(s.state in (RUNNING, QUEUED) for s in states.values()):
            time.sleep(2)
            states = states_of(grid)
            live.update(table(grid, states))
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """Make running members save and exit, and remove waiting ones from Slurm's queue."""
    parser = _parser("cancel", "Make running members save and exit, and dequeue waiting ones.")
    options = parser.parse_intermixed_args(arguments)
    grid, states = load(options.config, options.overrides)
    ended = cancel_jobs(grid.members)
    for member in grid.members:
        values = RunDirectory(member.config.run_directory).read_launch()
        here = values.get("host") == os.uname().nodename and values.get("pid")
        if states[member.name].state == RUNNING and member.name not in ended and here:
            os.kill(int(values["pid"]), signal.SIGTERM)
            ended.append(member.name)
    console = console_of()
    for name in ended:
        console.print(f"{name or grid.name}: asked to save and exit")
    if not ended:
        console.print("nothing is running or queued")
    return 0


def logs(arguments: Sequence[str]) -> int:
    """Print a run's output."""
    parser = _parser("logs", "Print a run's output.")
    parser.add_argument("--follow", action="store_true", help="continue until the run ends")
    options = parser.parse_intermixed_args(arguments)
    grid, _ = load(options.config, options.overrides)
    if len(grid.members) > 1:
        listed = ", ".join(str(m.config.run_directory) for m in grid.members)
        raise UserError(f"{options.config} is a grid, expected one run directory of: {listed}")
    (member,) = grid.members
    folder = RunDirectory(member.config.run_directory)
    path = next((p for p in (folder.output_file, folder.log_file) if p.exists()), None)
    if path is None:
        raise UserError(f"{folder} has no output yet")
    with path.open(errors="replace") as file:
        while True:
            text = file.read()
            sys.stdout.write(text)
            sys.stdout.flush()
            if not text:
                if not options.follow or states_of(grid)[member.name].state not in (
                    RUNNING,
                    QUEUED,
                ):
                    return 0
                time.sleep(1)


def measure(arguments: Sequence[str]) -> int:
    """Measure and save the tokens per second of each member of a grid on this machine."""
    parser = _parser("measure", "Train every member for some steps and save its tokens per second.")
    parser.add_argument("--steps", type=int, default=8, help="steps to time (8)")
    parser.add_argument("--processes", type=int, help="per run (tensor x pipeline)")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}, expected at least 1")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}, expected at least 1")
    grid = load_grid(options.config, options.overrides, measuring=True)
    console, speeds = console_of(), {}
    for member in grid.members:
        speeds[member.name] = throughput.measure(member.config, options.steps, options.processes)
        console.print(f"{member.name or grid.name}: {speeds[member.name]:,.0f} tokens/s")
    console.print(f"written to {throughput.write_throughput(grid.directory, speeds)}")
    return 0


def _parser(name: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m launch {name}", description=what)
    parser.add_argument("config", help="config of a run or a grid, or a run directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def load(path: str, overrides: Sequence[str]) -> tuple[Grid, dict[str, MemberState]]:
    """Load a grid and its members' states from a config, or from a run directory's config.

    Raises UserError for a folder that is no run directory.
    """
    folder = Path(path)
    if folder.is_dir():
        run = RunDirectory(folder)
        files = (run.config_file, run.launch_config_file)
        found = next((f for f in files if f.is_file()), None)
        if found is None:
            raise UserError(
                f"{folder} is a folder without {run.config_file.name}, expected a run directory"
            )
        folder = found
    grid = load_grid(folder, overrides)
    return grid, states_of(grid)


def states_of(grid: Grid) -> dict[str, MemberState]:
    """Return the members' states by name, from their run directories and Slurm's queue."""
    states = {member.name: member_state(member) for member in grid.members}
    for name, (state, reason) in queue_states(grid.members).items():
        if states[name].state != DONE:
            states[name].state = QUEUED if state == "PENDING" else RUNNING
            states[name].reason = reason if state == "PENDING" else ""
    return states


def console_of() -> Console:
    """Return a console as wide as the terminal, or wide enough to truncate nothing in files."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def table(grid: Grid, states: dict[str, MemberState], *, plan: bool = False) -> Table:
    """Return a table with a row per member: its progress, or with ``plan`` its size and cost."""
    counts = Counter(state.state for state in states.values())
    listed = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    matched = "" if grid.match is None else f"; {grid.match} matched"
    found = Table(title=f"{grid.name}: {listed}{matched}", title_justify="left")
    found.add_column("member", overflow="fold")
    columns = ("parameters", "tokens", "PFLOP") if plan else ("loss", "tokens/s", "left", "")
    for column in ("state", "step", *columns):
        found.add_column(column, justify="right" if column else "left", overflow="fold")
    total = 0.0
    for member in grid.members:
        state, config = states[member.name], member.config
        row = [member.name or grid.name, state.state, f"{state.step}/{config.train.num_steps}"]
        tokens = config.train.tokens_before(config.train.num_steps)
        if plan:
            model = counts_of(config)
            flops = model.training_flops() * tokens
            total += flops
            words = f"{model.parameters:,}" + ("" if config.model.vocab_size else " + vocabulary")
            row += [words, f"{tokens:,}", _pflop(flops)]
        else:
            left = state.seconds_left(config)
            row += [
                "" if state.loss is None else f"{state.loss:.4f}",
                "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
                "" if left is None or state.state in (DONE, FAILED, STOPPED) else _minutes(left),
                state.reason,
            ]
        found.add_row(*row)
    if plan and len(grid.members) > 1:
        found.add_section()
        found.add_row("together", "", "", "", "", _pflop(total))
    return found


def _pflop(flops: float) -> str:
    return f"{flops / 1e15:,.3g}" if flops < 1e17 else f"{flops / 1e15:,.0f}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
