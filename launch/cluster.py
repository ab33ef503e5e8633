"""The settings of the machine or Slurm cluster that runs start on, files of configs/clusters/."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launch.cluster_checks import check_cluster
from pretrain.common.config_loader import Config, ConfigError, load_config, setting
from pretrain.common.shipped_configs import find_config


@dataclass
class ContainerConfig(Config):
    """The container that a job's processes run in; the project is in the image."""

    image: str
    """The image, as the runtime names it."""
    runtime: Literal["pyxis", "apptainer"] = setting("pyxis")
    """``pyxis`` (srun --container-image, Enroot) or ``apptainer``."""
    mounts: list[str] = field(default_factory=list)
    """Folders of the host that are seen inside, as ``/outside:/inside``."""


@dataclass
class ClusterConfig(Config):
    """The place where runs are started.

    All settings but ``kind`` are for Slurm; null: the cluster's own default.
    """

    kind: Literal["local", "slurm"] = setting("slurm")
    """This machine, or a Slurm cluster."""
    partition: str | None = None
    """sbatch's ``--partition``."""
    account: str | None = None
    """sbatch's ``--account``."""
    qos: str | None = None
    """sbatch's ``--qos``."""
    constraint: str | None = None
    """sbatch's ``--constraint``."""
    nodes: int = setting(1, minimum=1)
    """Nodes of a job."""
    gpus_per_node: int = setting(0, minimum=0)
    """GPUs of each node; 0: the run is on CPUs."""
    cpus_per_node: int | None = setting(None, minimum=1)
    """Cores of each node that the job takes."""
    processes_per_node: int | None = setting(None, minimum=1)
    """Processes on each node; null: one for each GPU or, without GPUs, the run's processes over the
    nodes."""
    memory: str | None = None
    """Memory of each node that the job takes, as Slurm writes it (``64G``)."""
    time: str | None = None
    """Time limit of a job, as Slurm writes it (``12:00:00``)."""
    signal_seconds: int = setting(120, minimum=1, maximum=65535)
    """Seconds before the time limit at which a run saves and the job queues itself again."""
    container: ContainerConfig | None = None
    """The container that processes run in; null: none."""
    modules: list[str] = field(default_factory=list)
    """Environment modules to load first."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the run."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell before the run."""
    python: str = "python"
    """The interpreter that has the project."""
    sbatch_options: list[str] = field(default_factory=list)
    """Further options of sbatch, one in each entry, as ``--gres=gpu:8``."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of srun, one in each entry."""
    hardware: str | None = None
    """File of a machine, or its name in ``configs/hardware``, that ``--dry-run`` plans with."""

    def processes(self, wanted: int) -> int:
        """Return the number of processes on each node of a run that needs ``wanted`` in total.

        Raises ConfigError where these do not divide evenly over the nodes.
        """
        if self.processes_per_node is not None:
            return self.processes_per_node
        if self.gpus_per_node:
            return self.gpus_per_node
        if wanted % self.nodes:
            raise ConfigError(
                f"the run's {wanted} processes do not divide evenly over nodes = {self.nodes}; set "
                "processes_per_node"
            )
        return wanted // self.nodes


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster's file, or the one of that name in configs/clusters.

    Raises ConfigError, which names the setting.
    """
    file = find_config(path, "clusters")
    config = load_config(ClusterConfig, file)
    check_cluster(config, str(file))
    return config
