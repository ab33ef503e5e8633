"""Start a run, or a grid of runs, on this machine or on Slurm: ``python -m launch CONFIG``.

``status``, ``cancel`` and ``logs`` handle started runs; ``measure`` times a grid's members;
``decide`` starts the runs that tell which of several arms is better, ``watch`` shows runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from pretrain.common.argument_types import positive
from pretrain.common.errors import EXIT_STOPPED, UserError, run_command
from pretrain.common.quiet import quiet_process
from pretrain.common.screen import show_table

EXIT_FAILED = 1
COMMANDS = ("status", "cancel", "logs", "measure")


def main(command: Sequence[str] | None = None) -> int:
    """Run ``command``, by default of ``sys.argv``, and return the exit status."""
    quiet_process()
    command = sys.argv[1:] if command is None else command
    if command[:1] and command[0] == "decide":
        from launch.decisions.command import decide

        return decide(command[1:])
    if command[:1] and command[0] == "watch":
        from launch.watch.command import watch

        return watch(command[1:])
    if command[:1] and command[0] in COMMANDS:
        from launch import commands

        call: Any = getattr(commands, command[0])
        return call(command[1:])
    return _start(_parser().parse_intermixed_args(command))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Start a run, or a grid of runs, on this machine or on a Slurm cluster. "
        "Finished members are skipped and stopped ones resume. 'python -m launch status CONFIG' "
        "shows their progress, 'cancel CONFIG' ends them, 'logs RUN [--follow]' prints their "
        "output, 'measure GRID' times the members for grid.match: time, "
        "'decide FILE' says which of several arms is better, "
        "'watch [DIR]' follows runs on a page.",
        epilog="Exit status: 0 all done (or submitted), 1 some failed, 2 bad input, 75 stopped and "
        "saved (run the same command again to resume).",
    )
    parser.add_argument("config", help="config or directory of a run or a grid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every member")
    parser.add_argument("--cluster", help="a file of configs/clusters (default: this machine)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="show the members, the plan and the job script; start nothing",
    )
    parser.add_argument(
        "--at-once", type=positive, help="members at a time (default: 1 here, all on Slurm)"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        help="processes per run on this machine (default: tensor x pipeline x context)",
    )
    parser.add_argument(
        "--nodes", type=positive, help="nodes of a Slurm job (default: the cluster's file)"
    )
    parser.add_argument("--retry-failed", action="store_true", help="start failed members again")
    parser.add_argument(
        "--force", action="store_true", help="start runs with --force, see python -m pretrain"
    )
    return parser


def _start(arguments: argparse.Namespace) -> int:
    from launch.branches import check_trunks, jobs_of_trunks
    from launch.cluster import ClusterConfig, load_cluster
    from launch.commands import console_of, load, table
    from launch.directories import note_grid
    from launch.local import processes_of
    from launch.members import DONE, FAILED, QUEUED, RUNNING, check_same_settings
    from launch.planning import print_plans
    from launch.slurm import check_script, processes_per_node, render, submit
    from pretrain.common.outputs import check_folder
    from pretrain.data.manifest import check_outside_data
    from pretrain.model.layout import check_layout

    cluster = load_cluster(arguments.cluster) if arguments.cluster else ClusterConfig("local")
    if arguments.nodes is not None:
        if cluster.kind != "slurm":
            raise UserError(
                f"--nodes is {arguments.nodes}, but this machine is one node: name a Slurm cluster "
                "with --cluster, or use --processes"
            )
        cluster = dataclasses.replace(cluster, nodes=arguments.nodes)
    grid, states = load(arguments.config, arguments.overrides)
    for member in grid.members:
        check_folder(member.config.run_directory, f"{grid.path}: directory")
        check_same_settings(member)
        if cluster.kind == "slurm":
            count = cluster.nodes * processes_per_node(cluster, [member])
        else:
            count = processes_of(member.config, arguments.processes)
        where = f"{grid.path}, member {member.name}" if member.name else str(grid.path)
        check_layout(member.config, count, where)
        check_outside_data(member.config.run_directory, where)
    console = console_of()
    show_table(table(grid, states, plan=True), console)
    failed = [m for m in grid.members if states[m.name].state == FAILED]
    if failed and not arguments.retry_failed:
        for member in failed:
            console.print(
                f"{member.name or grid.name} failed before: {states[member.name].reason}; "
                "add --retry-failed to start it again"
            )
    skipped = {DONE, RUNNING, QUEUED} | (set() if arguments.retry_failed else {FAILED})
    members = [m for m in grid.members if states[m.name].state not in skipped]
    if arguments.dry_run:
        console.print(f"would start {len(members)} of {len(grid.members)}")
        if cluster.hardware is not None:
            print_plans(console, members, cluster.hardware, count)
        if cluster.kind == "local":
            _print_notes(_too_large_here(members, arguments))
        if cluster.kind == "slurm" and members:
            script = render(cluster, grid, members, arguments.at_once, force=arguments.force)
            console.print(script, soft_wrap=True)
            check_script(script)
        return 0
    check_trunks(members, str(grid.path))
    if cluster.kind == "local":
        too_large = _too_large_here(members, arguments)
        if len(too_large) > 1 or arguments.force:
            _print_notes(too_large)
        _refuse_unless_forced(too_large, str(grid.path), "starts", arguments)
    if len(grid.members) > 1:
        note_grid(grid)
    if not members:
        console.print("nothing to start")
        return EXIT_FAILED if failed else 0
    if cluster.kind == "slurm":
        too_large = []
        if cluster.hardware is not None:
            too_large = print_plans(console, members, cluster.hardware, count)
            plan = "python -m pretrain plan CONFIG --search shows what fits"
            too_large = [f"{sentence}; {plan}" for sentence in too_large]
        _refuse_unless_forced(too_large, str(grid.path), "submits", arguments)
        job, path = submit(
            cluster,
            grid,
            members,
            arguments.at_once,
            force=arguments.force,
            after=jobs_of_trunks(members),
        )
        again = shlex.join(["python", "-m", "launch", "status", str(grid.path)])
        console.print(f"submitted job {job}, {path}\nstatus  {again}")
        return 0
    return _run_here(arguments, grid, members, bool(failed))


def _too_large_here(members: Any, arguments: argparse.Namespace) -> list[str]:
    from launch.fitting import what_does_not_fit

    return what_does_not_fit(members, arguments.processes, arguments.at_once or 1)


def _print_notes(sentences: Sequence[str]) -> None:
    from launch.commands import console_of

    for sentence in sentences:
        console_of().print(f"note: {sentence}", soft_wrap=True)


def _refuse_unless_forced(
    too_large: Sequence[str], where: str, does: str, arguments: argparse.Namespace
) -> None:
    """Raise UserError with the first of the sentences about what does not fit, if there are any."""
    if not too_large or arguments.force:
        return
    others = len(too_large) - 1
    plural = "does 1 other member" if others == 1 else f"do {others} other members"
    raise UserError(
        f"{where}: {too_large[0]}; --force {does} it as it is"
        + (f"; nor {plural}, see above" if others else "")
    )


def _run_here(arguments: Any, grid: Any, members: Any, failed: bool) -> int:
    from launch.commands import console_of, states_of, table
    from launch.local import BEFORE_A_START, PASSED_OVER, run_queue

    console = console_of()

    def show(member: Any, what: str) -> None:
        # One run says itself that it starts and ends.
        if len(members) > 1 or what in PASSED_OVER or what.startswith(BEFORE_A_START):
            # The members go on where the screen, or what reads it, is gone.
            with contextlib.suppress(OSError, SystemExit):
                console.print(f"{member.name or grid.name}: {what}")

    statuses = run_queue(
        members,
        at_once=arguments.at_once or 1,
        processes=arguments.processes,
        force=arguments.force,
        show=show,
    )
    if len(grid.members) > 1:
        show_table(table(grid, states_of(grid)), console)
    if EXIT_STOPPED in statuses.values() or len(statuses) < len(members):
        return EXIT_STOPPED
    if len(members) == 1:
        return statuses[members[0].name]
    return EXIT_FAILED if any(statuses.values()) or failed else 0


if __name__ == "__main__":
    run_command(main)
