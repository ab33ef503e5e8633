"""Submit runs to Slurm with a readable batch script: one job for a run, an array for a grid."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2

from launch.cluster import ClusterConfig
from launch.grid import Grid, Member
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.masking import masked_command
from pretrain.run_directory import RunDirectory

_TEMPLATES = Path(__file__).parent / "templates"


def render(
    cluster: ClusterConfig, grid: Grid, members: Sequence[Member], at_once: int | None
) -> str:
    """Return the batch script for ``members`` of a grid.

    ``at_once`` limits how many run at a time. Raises UserError where the members need different
    numbers of processes per node.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    directories = [str(m.config.run_directory.resolve()) for m in members]
    python = cluster.python
    if cluster.container is not None and cluster.container.runtime == "apptainer":
        python = _apptainer(cluster, python)
    return environment.get_template("slurm.sh.j2").render(
        name=grid.name,
        cluster=cluster,
        directories=directories,
        python=python,
        options=_sbatch_options(cluster, grid, len(members), at_once),
        srun=_srun_options(cluster),
        processes=processes_per_node(cluster, members),
        working_directory=str(Path.cwd()),
    )


def processes_per_node(cluster: ClusterConfig, members: Sequence[Member]) -> int:
    """Return the number of processes per node, which must be the same for all members.

    Raises UserError where it is not.
    """
    found = {cluster.processes(m.config.parallel.model_size) for m in members}
    if len(found) > 1:
        raise UserError(
            f"members of the grid need different numbers of processes per node: {sorted(found)}; "
            "set processes_per_node in the cluster's file"
        )
    return found.pop()


def _sbatch_options(
    cluster: ClusterConfig, grid: Grid, count: int, at_once: int | None
) -> list[str]:
    given = {
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "nodes": cluster.nodes,
        "time": cluster.time,
        "gpus-per-node": cluster.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_node,
        "mem": cluster.memory,
    }
    options = [f"--{name}={value}" for name, value in given.items() if value is not None]
    options.append(f"--output={(grid.directory / 'slurm-%j.txt').resolve()}")
    if count > 1:
        throttle = f"%{at_once}" if at_once is not None else ""
        options.append(f"--array=0-{count - 1}{throttle}")
    return [*options, *cluster.sbatch_options]


def _srun_options(cluster: ClusterConfig) -> list[str]:
    # One process that ends with an error ends all; the others would wait for it.
    options = ["--kill-on-bad-exit=1", f"--nodes={cluster.nodes}", "--ntasks-per-node=1"]
    if cluster.cpus_per_node is not None:  # which srun does not take over from sbatch
        options.append(f"--cpus-per-task={cluster.cpus_per_node}")
    container = cluster.container
    if container is not None and container.runtime == "pyxis":
        options.append(f"--container-image={shlex.quote(container.image)}")
        if container.mounts:
            options.append(f"--container-mounts={shlex.quote(','.join(container.mounts))}")
    return [*options, *cluster.srun_options]


def _apptainer(cluster: ClusterConfig, python: str) -> str:
    container = cluster.container
    assert container is not None
    words = ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else [])]
    words += [f"--bind={mount}" for mount in container.mounts]
    return shlex.join([*words, container.image, python])


def submit(
    cluster: ClusterConfig, grid: Grid, members: Sequence[Member], at_once: int | None
) -> tuple[str, Path]:
    """Submit members of a grid to Slurm; return the job's id and the script's path.

    Raises UserError without Slurm, or with Slurm's reason where it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on PATH, so this machine is not part of a Slurm cluster: log in to "
            "one that is, or omit --cluster to run here"
        )
    script = render(cluster, grid, members, at_once)
    grid.directory.mkdir(parents=True, exist_ok=True)
    path = grid.directory / "job.sh"
    write_bytes(path, script.encode())
    for member in members:
        RunDirectory(member.config.run_directory).write_launch_config(member.config)
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {done.stderr.strip() or done.stdout.strip()}")
    job = done.stdout.strip().split(";")[0]
    for index, member in enumerate(members):
        number = f"{job}_{index}" if len(members) > 1 else job
        RunDirectory(member.config.run_directory).write_launch(
            job=number,
            script=str(path),
            submitted=time.time(),
            status=None,
            reason=None,
            failures=[],
            command=masked_command(sys.argv),
        )
    return job, path


def queue_states(members: Sequence[Member]) -> dict[str, tuple[str, str]]:
    """Return Slurm's state and reason of each member in its queue, by name."""
    jobs = {_job_of(member): member.name for member in members}
    jobs.pop("", None)
    if not jobs or shutil.which("squeue") is None:
        return {}
    numbers = sorted({job.split("_")[0] for job in jobs})
    done = subprocess.run(
        [
            "squeue",
            "--noheader",
            "--array",
            f"--jobs={','.join(numbers)}",
            "--states=all",
            "--format=%i|%T|%r",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    found = {}
    for line in done.stdout.splitlines():  # none where Slurm has forgotten the jobs
        number, state, reason = line.split("|")
        if number in jobs and state in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"):
            found[jobs[number]] = (state, reason)
    return found


def cancel(members: Sequence[Member]) -> list[str]:
    """Cancel the members that are in Slurm's queue, and return their names."""
    names = queue_states(members)
    jobs = [_job_of(member) for member in members if member.name in names]
    if jobs:
        subprocess.run(["scancel", *jobs], check=False)
    return list(names)


def _job_of(member: Member) -> str:
    """Return the id of the job that a member was submitted as, or an empty string."""
    return str(RunDirectory(member.config.run_directory).read_launch().get("job") or "")
