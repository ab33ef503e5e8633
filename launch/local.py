"""Run one config, or a grid's members from a queue, on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from launch.branches import Waiting
from launch.claims import Claim, claim
from launch.grid import Member
from launch.members import DONE, FAILED, member_state
from pretrain.common.errors import EXIT_STOPPED, UserError
from pretrain.common.process_identity import identity_of
from pretrain.config import RunConfig
from pretrain.run_directory import RunDirectory

EXIT_FAILED = 1
# What becomes of members that need not be started after all, and their exit status.
PASSED_OVER = {
    "left to another launcher, which is running it": 0,
    "left out, it is running already": 0,
    "done already": 0,
    "failed under another launcher": EXIT_FAILED,
}
BEFORE_A_START = ("waits for ", "not started: ")  # what is said of branches


@dataclass
class Running:
    """A member that is running; output goes to a file in its directory, or to the screen."""

    member: Member
    process: subprocess.Popen[bytes]
    output: IO[bytes] | None
    claim: Claim


def processes_of(config: RunConfig, wanted: int | None = None) -> int:
    """Return the number of processes of a run: ``wanted``, or as many as one model copy needs.

    Raises UserError if this machine has fewer GPUs (or, without GPUs, cores).
    """
    count = wanted or config.parallel.model_size
    available = _available()
    if count > available:
        parallel = config.parallel
        sizes = f"{parallel.tensor} x {parallel.pipeline} x {parallel.context}"
        needed = "" if wanted else f" (parallel.tensor x pipeline x context = {sizes})"
        raise UserError(
            f"{config.name} needs {count} processes{needed}, more than this machine's "
            f"{available} {'GPUs' if _gpus() else 'cores'}; use fewer, or a cluster"
        )
    return count


def command_of(config_path: Path, processes: int, *, force: bool = False) -> list[str]:
    """Return the command that starts a run, with torchrun if there are several processes.

    ``force``: with ``--force``.
    """
    torchrun = ["-m", "pretrain.parallel.torchrun", "--standalone", f"--nproc-per-node={processes}"]
    launcher = torchrun if processes > 1 else []
    forced = ["--force"] if force else []
    return [sys.executable, *launcher, "-m", "pretrain", str(config_path), *forced]


def run_queue(
    members: Sequence[Member],
    *,
    at_once: int,
    processes: int | None,
    force: bool = False,
    show: Callable[[Member, str], None],
) -> dict[str, int]:
    """Run all members, ``at_once`` at a time, and return their exit statuses by name.

    A single member writes to the screen. An interrupt is forwarded to the running members, which
    save and exit, and ends the queue. ``show`` is called when a member starts and ends. One that
    another launcher has come to meanwhile is passed over, with the status of :data:`PASSED_OVER`.
    A branch waits until its trunk has come that far, and is not started where it never will.
    """
    begun = time.time()
    waiting, statuses = Waiting(members, show), dict[str, int]()
    running: list[Running] = []
    alone = len(members) == 1
    stopped: list[int] = []

    def stop(number: int, _: Any) -> None:
        stopped.append(number)
        for run in running:
            run.process.send_signal(number)

    before = {n: signal.signal(n, stop) for n in _stop_signals()}
    try:
        while running or (waiting and not stopped):
            while waiting and len(running) < at_once and not stopped:
                member, never = waiting.next([run.member for run in running])
                if member is None:
                    break
                if never:
                    statuses[member.name] = EXIT_FAILED
                    show(member, f"not started: {never}")
                    continue
                found = _claim(member, begun)
                if isinstance(found, str):
                    statuses[member.name] = PASSED_OVER[found]
                    show(member, found)
                    continue
                count = processes_of(member.config, processes)
                command = command_of(
                    RunDirectory(member.config.run_directory).launch_config_file, count, force=force
                )
                running.append(
                    _start(member, command, environment_of(count, at_once), alone, found)
                )
                show(member, "started")
            time.sleep(0.1)
            for run in [r for r in running if r.process.poll() is not None]:
                running.remove(run)
                status, words = _finished(run, stopped=bool(stopped))
                statuses[run.member.name] = status
                show(run.member, words)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return statuses


def _stop_signals() -> list[int]:
    """Return the signals that end a queue: SIGHUP, of a closed terminal, unless it is ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as under nohup
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def environment_of(processes: int, at_once: int = 1) -> dict[str, str]:
    """Return a run's environment: this process's, with the cores divided into threads."""
    threads = max(1, _available_cores() // (at_once * processes))
    return {"OMP_NUM_THREADS": str(threads), **os.environ}


def _claim(member: Member, begun: float) -> Claim | str:
    """Claim a member that is to be started; return why not, of :data:`PASSED_OVER`.

    Another launcher may have come to it since this one looked, at the time ``begun``.
    """
    running, elsewhere, done, failed = PASSED_OVER
    directory = RunDirectory(member.config.run_directory)
    found = claim(directory)
    if found is None:
        return running
    state = member_state(member, held=False).state
    if directory.is_locked():
        reason = elsewhere
    elif state == DONE:
        reason = done
    elif state == FAILED and (directory.read_launch().get("ended") or 0) > begun:
        reason = failed
    else:
        return found
    found.release()
    return reason


def _start(
    member: Member, command: list[str], environment: dict[str, str], alone: bool, held: Claim
) -> Running:
    directory = RunDirectory(member.config.run_directory)
    directory.write_launch_config(member.config)
    output = None if alone else directory.output_file.open("ab")
    directory.write_launch(
        command=command,
        started=time.time(),
        status=None,
        reason=None,
        cancelled=None,
        launcher=identity_of(os.getpid()),
    )
    process = subprocess.Popen(
        command,
        stdout=output,
        stderr=subprocess.STDOUT if output else None,
        env=environment,
        # Ctrl-C reaches the terminal's whole process group: children must get it only from here.
        start_new_session=True,
    )
    directory.write_launch(**identity_of(process.pid))
    return Running(member, process, output, held)


def _finished(run: Running, *, stopped: bool) -> tuple[int, str]:
    """Return a run's exit status, also in words.

    After a signal torchrun's own status says nothing about its processes, so it is replaced.
    """
    status = run.process.returncode
    if run.output is not None:
        run.output.close()
    directory = RunDirectory(run.member.config.run_directory)
    if status and (stopped or directory.read_launch().get("cancelled")):
        status = EXIT_STOPPED
    reason = ""
    if status not in (0, EXIT_STOPPED):
        reason = directory.last_error() or f"exit status {status}"
    directory.write_launch(ended=time.time(), status=status, reason=reason)
    run.claim.release()
    words = {0: "done", EXIT_STOPPED: "stopped, saved"}.get(status, f"failed: {reason}")
    return status, words


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _available() -> int:
    return _gpus() or _available_cores()
