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
from pretrain.common.text import control_character
from pretrain.run_directory import RunDirectory

_TEMPLATES = Path(__file__).parent / "templates"


def render(
    cluster: ClusterConfig,
    grid: Grid,
    members: Sequence[Member],
    at_once: int | None,
    *,
    force: bool = False,
    after: Sequence[str] = (),
) -> str:
    """Return the batch script for ``members`` of a grid.

    A branch looks at its trunk first, and queues again until that has come far enough; none starts
    before the jobs ``after`` have. ``at_once`` limits how many run at a time; ``force`` starts them
    with ``--force``. Raises UserError where the members need different numbers of processes per
    node, or a name cannot be written in a script.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    directories = [str(m.config.run_directory.resolve()) for m in members]
    for text in (grid.name, str(Path.cwd()), *directories):
        found = control_character(text)
        if found is not None:
            raise UserError(f"{text!r} has {found}, expected a name without control characters")
    command = [cluster.python]
    if cluster.container is not None and cluster.container.runtime == "apptainer":
        command = _apptainer(cluster, cluster.python)
    return environment.get_template("slurm.sh.j2").render(
        cluster=cluster,
        directories=directories,
        command=shlex.join(command),
        options=[
            _directive(x) for x in _sbatch_options(cluster, grid, len(members), at_once, after)
        ],
        branches=any(m.config.branch is not None for m in members),
        srun=shlex.join(_srun_options(cluster)),
        processes=processes_per_node(cluster, members),
        force=force,
        working_directory=str(Path.cwd()),
    )


def _directive(option: str) -> str:
    """Quote an option for a line of #SBATCH, where a backslash counts within single quotes too."""
    return shlex.quote(option.replace("\\", "\\\\"))


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
    cluster: ClusterConfig, grid: Grid, count: int, at_once: int | None, after: Sequence[str]
) -> list[str]:
    given = {
        "job-name": grid.name,
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
    folder = str(grid.directory.resolve())
    if "\\" in folder:  # Slurm would write to another file
        raise UserError(f"{folder} has a backslash, which Slurm reads as no part of a file's name")
    options.append(f"--output={folder.replace('%', '%%')}/slurm-%j.txt")
    if after:
        options.append(f"--dependency=after:{':'.join(after)}")
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
        options.append(f"--container-image={container.image}")
        if container.mounts:
            options.append(f"--container-mounts={','.join(container.mounts)}")
    return [*options, *cluster.srun_options]


def _apptainer(cluster: ClusterConfig, python: str) -> list[str]:
    container = cluster.container
    assert container is not None
    words = ["apptainer", "exec", *(["--nv"] if cluster.gpus_per_node else [])]
    words += [f"--bind={mount}" for mount in container.mounts]
    return [*words, container.image, python]


def check_script(script: str) -> None:
    """Have sbatch check a script without submitting it, where a Slurm answers.

    Raises UserError with Slurm's reason where it would refuse the job.
    """
    if shutil.which("sbatch") is None or shutil.which("scontrol") is None:
        return
    if subprocess.run(["scontrol", "ping"], capture_output=True, check=False).returncode:
        return  # no part of a cluster, or its controller is away
    done = subprocess.run(
        ["sbatch", "--test-only"], input=script, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"sbatch would refuse this script: {_reason(done)}")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr.strip() or done.stdout.strip()).split())


def submit(
    cluster: ClusterConfig,
    grid: Grid,
    members: Sequence[Member],
    at_once: int | None,
    *,
    force: bool = False,
    after: Sequence[str] = (),
) -> tuple[str, Path]:
    """Submit members of a grid to Slurm, as :func:`render` says; return job id and script.

    Raises UserError without Slurm, or with Slurm's reason where it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on PATH, so this machine is not part of a Slurm cluster: log in to "
            "one that is, or omit --cluster to run here"
        )
    script = render(cluster, grid, members, at_once, force=force, after=after)
    grid.directory.mkdir(parents=True, exist_ok=True)
    path = grid.directory / "job.sh"
    write_bytes(path, script.encode())
    for member in members:
        RunDirectory(member.config.run_directory).write_launch_config(member.config)
    done = subprocess.run(
        ["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"sbatch refused {path}: {_reason(done)}")
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
