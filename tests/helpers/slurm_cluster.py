"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, started by hand."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# A job that was queued again waits until its old credentials have run out.
AuthInfo=cred_expire=5,socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0,batch_sched_delay=0
ReturnToService=2
SlurmdTimeout=8
KillWait=20
JobRequeue=1
MpiDefault=none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
NodeName=n[1-2] NodeAddr=127.0.0.1 NodeHostname={host} Port={first}-{second} CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO \
  PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=urgent Nodes=n[1-2] MaxTime=INFINITE State=UP OverSubscribe=NO \
  PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here, or nothing."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} on PATH: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "slurmd started by hand needs root"


class SlurmCluster:
    """Owns the daemons; ``environment`` makes Slurm's commands talk to them."""

    def __init__(self, folder: Path, port: int = 17300):
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        for name in ("state", "spool-n1", "spool-n2"):
            (folder / name).mkdir()
        (folder / "slurm.conf").write_text(
            CONFIG.format(
                folder=folder, host=os.uname().nodename, port=port, first=port + 1, second=port + 2
            )
        )
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        self._run(
            "munged",
            f"--key-file={key}",
            f"--socket={folder}/munge.socket",
            "--force",
            f"--pid-file={folder}/munge.pid",
            f"--log-file={folder}/munge.log",
            f"--seed-file={folder}/munge.seed",
        )
        self._run("slurmctld", "-c")
        self.start_node("n1")
        self.start_node("n2")
        self.wait_for(lambda: self.command("sinfo", "-h", "-o", "%T") == "idle", 30)

    def _run(self, *command: str) -> None:
        subprocess.run(command, env=self.environment, check=True, capture_output=True)

    def start_node(self, name: str) -> None:
        """Begin a node's slurmd."""
        self._run("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """As a node that goes down: its slurmd and all that it started."""
        victims = {int((self.folder / f"slurmd-{name}.pid").read_text())}
        for process in psutil.process_iter():
            try:
                if process.environ().get("SLURMD_NODENAME") == name:
                    victims |= {process.pid} | {
                        p.pid for p in process.parents() if p.name().startswith("slurmstepd")
                    }
            except psutil.Error:
                continue
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def command(self, *command: str) -> str:
        """The output of one of Slurm's commands."""
        done = subprocess.run(
            command, env=self.environment, check=False, capture_output=True, text=True
        )
        return done.stdout.strip()

    def job_state(self, job: str) -> str:
        """PENDING, RUNNING, COMPLETED, ...; of an array, all of its tasks'."""
        return self.command("squeue", "-h", "--array", "-j", job, "--states=all", "-o", "%T")

    def wait_for(self, holds, seconds: float) -> None:
        """Raise TimeoutError, with Slurm's view of things, unless it holds in time."""
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                queue = self.command("squeue", "--states=all", "-o", "%i %T %r %N")
                nodes = self.command("sinfo", "-N", "-l")
                raise TimeoutError(f"after {seconds} s:\n{queue}\n{nodes}")
            time.sleep(0.2)

    def stop(self) -> None:
        """End all jobs and daemons."""
        self.command("scancel", "--user=root")
        time.sleep(1)
        names = ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge.pid")
        for name in names:
            try:
                os.kill(int((self.folder / name).read_text()), signal.SIGKILL)
            except (OSError, ValueError):
                continue
