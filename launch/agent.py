"""Run one node's share of a Slurm job: ``python -m launch.agent RUN/launch.yaml``.

It starts torchrun, and on the first node decides what becomes of the run when its processes end.
SIGUSR2 is forwarded to the training processes, which save at the end of their step, and the job is
queued again. SIGTERM saves too; the job is then queued again if it was preempted, but not if it was
cancelled. After a failure the run is started again on the same nodes; where the same step fails
again the job is queued again, perhaps for other nodes, and where it fails a third time it ends.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.common.errors import EXIT_STOPPED

if TYPE_CHECKING:
    from pretrain.config import RunConfig
    from pretrain.run_directory import RunDirectory

EXIT_FAILED = 1
_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
# What the batch script is asked for when the run fails once, and twice, at the same step.
_AGAIN = (".restart", ".requeue")


def main() -> int:
    """Run torchrun for this node's processes and return the agent's exit status."""
    received: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: Any) -> None:
        received.append(number)
        if process is not None:
            _signal_training(process)

    # Before anything that takes long to import: a signal may come at any time.
    for number in _SIGNALS:
        signal.signal(number, forward)
    parser = argparse.ArgumentParser(prog="python -m launch.agent", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--nproc-per-node", type=int, required=True)
    parser.add_argument("--attempt", type=int, default=0)  # starts before on the job's nodes
    parser.add_argument("--force", action="store_true")
    arguments = parser.parse_args()

    from pretrain.config import load_saved_config
    from pretrain.run_directory import RunDirectory

    config = load_saved_config(arguments.config)
    node = int(os.environ.get("SLURM_NODEID", "0"))
    directory = RunDirectory(arguments.config.parent)
    command = _torchrun(arguments.config, arguments.nproc_per_node, node, arguments.attempt)
    if arguments.force:
        command.append("--force")
    if node == 0:
        directory.write_launch(
            started=time.time(),
            status=None,
            reason=None,
            command=command,
            job=_job(),
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )
    # In a session of its own, away from signals to the task: torchrun would end its processes.
    process = subprocess.Popen(command, start_new_session=True)
    status = None
    while status is None:
        try:
            status = process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            if received:  # again, for those that had not begun; the others ignore it
                _signal_training(process)
    for number in _SIGNALS:  # there is no process left to forward them to
        signal.signal(number, signal.SIG_IGN)
    if node != 0:
        # Not an error: srun would then end the first node's agent before it has decided. Its
        # processes end for the same reason as these.
        print(f"== node {node} ended with status {status}", flush=True)
        return 0
    return _decide(config, directory, received, status)


def _torchrun(config: Path, processes: int, node: int, attempt: int) -> list[str]:
    """Return the torchrun command that joins all nodes.

    Its port differs between a node's jobs, and between a job's attempts: the last one's may still
    be taken for a while.
    """
    job = int(os.environ.get("SLURM_JOB_ID", "0"))
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return [
        sys.executable,
        "-m",
        "pretrain.parallel.torchrun",
        f"--nnodes={os.environ.get('SLURM_NNODES', '1')}",
        f"--node-rank={node}",
        f"--nproc-per-node={processes}",
        "--max-restarts=0",
        # The batch script runs on the first node, and srun in it.
        f"--master-addr={os.environ.get('SLURM_LAUNCH_NODE_IPADDR', '127.0.0.1')}",
        f"--master-port={20000 + (7 * job + restarts + 1009 * attempt) % 20000}",
        "-m",
        "pretrain",
        str(config),
    ]


def _job() -> str:
    array, task = (os.environ.get(f"SLURM_ARRAY_{x}_ID") for x in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def _signal_training(process: subprocess.Popen[bytes]) -> None:
    """Send SIGUSR2 to torchrun's own children, which handle it, and to no other process."""
    import psutil

    try:
        children = psutil.Process(process.pid).children()
    except psutil.NoSuchProcess:
        return
    for child in children:
        try:
            if "RANK" in child.environ():
                child.send_signal(signal.SIGUSR2)
        except psutil.Error:
            continue


def _decide(config: RunConfig, directory: RunDirectory, received: list[int], status: int) -> int:
    """Record how the run ended, and mark the job to be queued again if it should be."""
    from launch.grid import Member
    from launch.members import DONE, member_state

    state = member_state(Member("", {}, config), held=False)
    if state.state == DONE and not (received and status):
        directory.write_launch(ended=time.time(), status=0, reason=None)
        return 0
    if received:
        # SIGTERM: the batch script asks Slurm whether it comes from a preemption.
        name = ".requeue" if signal.SIGUSR2 in received else ".terminated"
        (directory.path / name).touch()
        directory.write_launch(ended=time.time(), status=EXIT_STOPPED, reason=None)
        return 0  # the others may still be ending
    reason = directory.last_error()
    failures = directory.read_launch().get("failures") or []
    failures = [*failures, {"step": state.step, "reason": reason}]
    same = list(itertools.takewhile(lambda f: f["step"] == state.step, reversed(failures)))
    if len(same) > len(_AGAIN):
        reason = f"failed {len(same)} times after step {state.step}: {reason}"
        print(f"== {reason}", flush=True)
    else:
        (directory.path / _AGAIN[len(same) - 1]).touch()
    directory.write_launch(ended=time.time(), status=EXIT_FAILED, reason=reason, failures=failures)
    return EXIT_FAILED


if __name__ == "__main__":
    from pretrain.common.errors import run_command

    run_command(main)
