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
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from launch import throughput
from launch.branches import can_begin, describe_wait
from launch.directories import load_targets
from launch.expansion import load_grid
from launch.grid import Grid, Member
from launch.matching import counts_of
from launch.members import (
    DONE,
    FAILED,
    QUEUED,
    RUNNING,
    STOPPED,
    WAITING,
    MemberState,
    member_state,
)
from launch.slurm import cancel as cancel_jobs
from launch.slurm import queue_states
from pretrain.common.errors import UserError
from pretrain.common.process_identity import send_signal
from pretrain.common.screen import fit_table, plain_console, readable, show_table, titled_table
from pretrain.run_arguments import read_grid
from pretrain.run_directory import RunDirectory


def status(arguments: Sequence[str]) -> int:
    """Show the progress of a grid's members, once or until all have ended."""
    parser = _parser("status", "Show the progress of a run, or of a grid's members.")
    parser.add_argument("--watch", action="store_true", help="update until all have ended")
    options = parser.parse_intermixed_args(arguments)
    grid, states = load(options.config, options.overrides)
    console = console_of()
    if not options.watch:
        show_table(table(grid, states), console)
        return 0
    with Live(
        fit_table(table(grid, states), console.width), console=console, refresh_per_second=1
    ) as live:
        while any(s.state in (RUNNING, QUEUED) for s in states.values()):
            time.sleep(2)
            states = states_of(grid)
            live.update(fit_table(table(grid, states), console.width))
    return 0


def cancel(arguments: Sequence[str]) -> int:
    """Make running members save and exit, and remove waiting ones from Slurm's queue."""
    parser = _parser("cancel", "Make running members save and exit, and dequeue waiting ones.")
    options = parser.parse_intermixed_args(arguments)
    grid, states = load(options.config, options.overrides)
    console, queued = console_of(), cancel_jobs(grid.members)
    for member in grid.members:
        if member.name not in queued and states[member.name].state != RUNNING:
            continue
        words = "asked to save and exit"
        if member.name not in queued:
            words = _stop(RunDirectory(member.config.run_directory)) or words
        console.print(f"{member.name or grid.name}: {words}")
    for launcher in _launchers_of(grid):  # or they would go on with the next members
        send_signal(launcher, signal.SIGTERM)
    if not queued and all(state.state != RUNNING for state in states.values()):
        console.print("nothing is running or queued")
    return 0


def _launchers_of(grid: Grid) -> list[dict[str, Any]]:
    """Return the processes that launch members of whole grids, every member of which is named.

    The launcher of a grid that is named in part goes on with the others.
    """
    named = {member.config.run_directory.resolve() for member in grid.members}
    found = []
    for folder in {directory.parent for directory in named}:
        members = read_grid(folder).get("members") or []
        if len(members) > 1 and {folder / name for name in members} <= named:
            launches = (RunDirectory(folder / name).read_launch() for name in members)
            found += [launch["launcher"] for launch in launches if launch.get("launcher")]
    return found


def _stop(directory: RunDirectory) -> str:
    """Ask the process that trains in a directory to save and exit; return why that cannot be done.

    That is the one that holds the lock, whoever started it; before it does, the one that a launcher
    has just started.
    """
    locked = directory.is_locked()
    process = directory.lock_holder() if locked else directory.read_launch()
    directory.write_launch(cancelled=time.time())
    if send_signal(process, signal.SIGTERM):
        return ""
    directory.write_launch(cancelled=None)
    host = process.get("host")
    if host not in (None, os.uname().nodename):
        return f"not asked, it runs on {host}: run this command there"
    return "not asked, its process is not known: stop it where it was started"


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
    parser.add_argument("--processes", type=int, help="per run (tensor x pipeline x context)")
    options = parser.parse_intermixed_args(arguments)
    if options.steps < 1:
        raise UserError(f"--steps is {options.steps}, expected at least 1")
    if options.processes is not None and options.processes < 1:
        raise UserError(f"--processes is {options.processes}, expected at least 1")
    if Path(options.config).is_dir():
        grid = load_targets([options.config, *options.overrides])
    else:
        grid = load_grid(options.config, options.overrides, measuring=True)
    console, speeds = console_of(), {}
    for member in grid.members:
        speed = throughput.measure(member.config, options.steps, options.processes)
        speeds[member.name] = speed.tokens_per_second
        phases = ", ".join(f"{name} {found:,.0f}" for name, found in speed.phases.items())
        console.print(
            f"{member.name or grid.name}: {speed.tokens_per_second:,.0f} tokens/s"
            + (f" ({phases})" if phases else "")
        )
    console.print(f"written to {throughput.write_throughput(grid.directory, speeds)}")
    return 0


def _parser(name: str, what: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"python -m launch {name}", description=what)
    parser.add_argument("config", help="config or directory of a run or a grid, or a glob")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="or more of them")
    return parser


def load(path: str, words: Sequence[str]) -> tuple[Grid, dict[str, MemberState]]:
    """Load runs and their states; see :func:`launch.directories.load_targets`."""
    grid = load_targets([path, *words])
    return grid, states_of(grid)


def states_of(grid: Grid) -> dict[str, MemberState]:
    """Return the members' states by name, from their run directories and Slurm's queue."""
    states = {member.name: member_state(member) for member in grid.members}
    add_queue(states, grid.members, queue_states(grid.members))
    return states


def add_queue(
    states: dict[str, MemberState],
    members: Sequence[Member],
    queue: dict[str, tuple[str, str]],
) -> None:
    """Add to members' states, by name, what Slurm's ``queue`` says, and what branches wait for."""
    for name, (state, reason) in queue.items():
        if states[name].state != DONE:
            states[name].state = QUEUED if state == "PENDING" else RUNNING
            states[name].reason = reason if state == "PENDING" else ""
    for member in members:
        found = states[member.name]
        if found.state in (WAITING, QUEUED) and not can_begin(member.config):
            found.reason = describe_wait(member.config)


def console_of() -> Console:
    """Return a console as wide as the terminal, or wide enough to truncate nothing in files."""
    return plain_console(width=None if sys.stdout.isatty() else 200)


def table(grid: Grid, states: dict[str, MemberState], *, plan: bool = False) -> Table:
    """Return a table with a row per member: its progress, or with ``plan`` its size and cost."""
    counts = Counter(state.state for state in states.values())
    listed = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    matched = "" if grid.match is None else f"; {grid.match} matched"
    columns = (
        ("parameters", "tokens", "PFLOP")
        if plan
        else ("loss", "validation loss", "bits per byte", "tokens/s", "left")
    )
    reasons = not plan and any(state.reason for state in states.values())
    found = titled_table(
        f"{grid.name}: {listed}{matched}",
        *("member", "state", "step", *columns, *(["reason"] if reasons else [])),
        left=("state", "reason"),
    )
    total = 0.0
    for member in grid.members:
        state, config = states[member.name], member.config
        row = [member.name or grid.name, state.state, f"{state.step:,}/{config.plan.num_steps:,}"]
        tokens = config.plan.tokens - config.plan.tokens_before(config.first_step)
        if plan:
            model = counts_of(config)
            flops = model.training_flops() * tokens
            total += flops
            words = f"{model.parameters:,}" + ("" if config.model.vocab_size else " + vocabulary")
            row += [words, f"{tokens:,}", _pflop(flops)]
        else:
            left = state.seconds_left(config)
            row += [
                *(
                    "" if value is None else f"{value:.4f}"
                    for value in (state.loss, state.valid_loss, state.valid_bits_per_byte)
                ),
                "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
                "" if left is None or state.state in (DONE, FAILED, STOPPED) else _minutes(left),
                *([state.reason] if reasons else []),
            ]
        found.add_row(*row)
    if plan and len(grid.members) > 1:
        found.add_section()
        found.add_row("together", "", "", "", "", _pflop(total))
    return found


def _pflop(flops: float) -> str:
    return readable(flops / 1e15)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
