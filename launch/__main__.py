"""``python -m launch CONFIG``: start a run, or a grid of runs, on this machine;
``python -m launch status CONFIG``: how far they are."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.errors import UserError, run_command

EXIT_FAILED = 1


def main(command: Sequence[str] | None = None) -> int:
    command = sys.argv[1:] if command is None else command
    if command[:1] == ["status"]:
        return _status(command[1:])
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start a run, or a grid of runs, on this machine; what is done is left out, "
        "what was stopped goes on. 'python -m launch status CONFIG' shows how far they are.",
        epilog="Exit status: 0 all done, 1 some failed, 2 bad input, 75 stopped and saved: run the "
        "same command again.",
    )
    parser.add_argument("config", help="of a run or a grid, or a run's directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every member")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, start nothing")
    parser.add_argument("--at-once", type=_positive, default=1, help="members at a time (1)")
    parser.add_argument("--processes", type=_positive,
                        help="per run (tensor x pipeline: one copy of the model)")  # fmt: skip
    parser.add_argument("--retry-failed", action="store_true", help="start failed members again")
    arguments = parser.parse_intermixed_args(command)

    from launch.grid import load_grid
    from launch.local import EXIT_STOPPED, processes_of, run_queue
    from launch.members import (
        DONE,
        FAILED,
        RUNNING,
        check_same_settings,
        member_state,
    )
    from pretrain.parallel.layout import check_layout

    grid = load_grid(_config_of(arguments.config), arguments.overrides)
    console = _console()
    states = {}
    for member in grid.members:
        check_same_settings(member)
        count = processes_of(member.config, arguments.processes)
        check_layout(member.config, count, f"{grid.path}, member {member.name}"
                     if member.name else str(grid.path))  # fmt: skip
        states[member.name] = member_state(member)
    console.print(_table(grid, states, plan=True))
    failed = [m for m in grid.members if states[m.name].state == FAILED]
    if failed and not arguments.retry_failed:
        for member in failed:
            console.print(f"{member.name} failed before: {states[member.name].reason}; "
                          "--retry-failed starts it again")  # fmt: skip
    left_out = {DONE, RUNNING} | (set() if arguments.retry_failed else {FAILED})
    members = [m for m in grid.members if states[m.name].state not in left_out]
    if arguments.dry_run:
        console.print(f"would start {len(members)} of {len(grid.members)}")
        return 0
    if not members:
        console.print("nothing to start")
        return EXIT_FAILED if failed else 0

    def show(member: Any, what: str) -> None:
        if len(members) > 1:
            console.print(f"{member.name}: {what}")

    statuses = run_queue(
        members, at_once=arguments.at_once, processes=arguments.processes, show=show
    )
    if len(grid.members) > 1:
        console.print(_table(grid, {m.name: member_state(m) for m in grid.members}))
    if EXIT_STOPPED in statuses.values() or len(statuses) < len(members):
        return EXIT_STOPPED
    if len(members) == 1:
        return statuses[members[0].name]
    return EXIT_FAILED if any(statuses.values()) or failed else 0


def _status(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m launch status")
    parser.add_argument("config", help="of a run or a grid, or a run's directory")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_intermixed_args(arguments)

    from launch.grid import load_grid
    from launch.members import member_state

    grid = load_grid(_config_of(options.config), options.overrides)
    states = {member.name: member_state(member) for member in grid.members}
    _console().print(_table(grid, states))
    return 0


def _console() -> Console:
    """As wide as the terminal; files get lines that nothing is cut from."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _config_of(path: str) -> Path:
    """A run directory stands for the settings that it was made with."""
    folder = Path(path)
    if not folder.is_dir():
        return folder
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is a folder without config.yaml, expected a run's directory")
    return folder / "config.yaml"


def _table(grid: Any, states: dict[str, Any], *, plan: bool = False) -> Table:
    from pretrain.models.blocks import count_model

    counts = Counter(state.state for state in states.values())
    told = ", ".join(f"{number} {state}" for state, number in sorted(counts.items()))
    matched = "" if grid.match is None else f"; {grid.match} made alike"
    table = Table(title=f"{grid.name}: {told}{matched}", title_justify="left")
    table.add_column("member", overflow="fold")
    columns = ("parameters", "tokens", "PFLOP") if plan else ("loss", "tokens/s", "left")
    for column in ("state", "step", *columns):
        table.add_column(column, justify="right")
    total = 0.0
    for member in grid.members:
        state, train = states[member.name], member.config.train
        row = [member.name or grid.name, state.state, f"{state.step}/{train.num_steps}"]
        tokens = train.tokens_before(train.num_steps)
        if plan:
            size = member.config.model.vocab_size
            found = count_model(member.config.model, size or 1, train.seq_len)
            flops = found.training_flops() * tokens
            total += flops
            row += [
                f"{found.parameters:,}" + ("" if size else " + vocabulary"),
                f"{tokens:,}", _pflop(flops),
            ]  # fmt: skip
        else:
            left = state.seconds_left(member.config)
            row += [
                "" if state.loss is None else f"{state.loss:.4f}",
                "" if state.tokens_per_second is None else f"{state.tokens_per_second:,.0f}",
                "" if left is None or state.state in ("done", "failed") else _minutes(left),
            ]  # fmt: skip
        table.add_row(*row)
    if plan and len(grid.members) > 1:
        table.add_section()
        table.add_row("together", "", "", "", "", _pflop(total))
    return table


def _pflop(flops: float) -> str:
    return f"{flops / 1e15:,.3g}" if flops < 1e17 else f"{flops / 1e15:,.0f}"


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from 1")
    return int(text)


if __name__ == "__main__":
    run_command(main)
