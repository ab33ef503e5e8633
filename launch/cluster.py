"""Where runs are started: this machine, or a Slurm cluster. See configs/clusters/."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.common.config_loader import ConfigError, load_config, setting

_TIME = re.compile(r"(\d+-)?\d{1,3}(:\d{2}){0,2}")


@dataclass
class ContainerConfig:
    """runtime: ``pyxis`` (srun --container-image, Enroot) or ``apptainer``; mounts:
    ``/outside:/inside``; the project lies in the image."""

    image: str
    runtime: str = setting("pyxis", choices=("pyxis", "apptainer"))
    mounts: list[str] = field(default_factory=list)


@dataclass
class ClusterConfig:
    """kind: ``local``, or ``slurm``, which all else is for.

    nodes, gpus_per_node, cpus_per_node, memory (of a node, as Slurm writes it), time (likewise),
    partition, account, qos, constraint: as sbatch knows them; null = the cluster's own default.
    processes_per_node: null = one for each GPU, or without GPUs the run's processes over the nodes.

    signal_seconds: how long before the time limit a run saves and the job queues itself again.
    modules: loaded first; environment: variables; setup: lines of shell; python: the interpreter
    that has the project; sbatch_options, srun_options: more of them, as on the command line.
    hardware: file that --dry-run plans with.
    """

    kind: str = setting("slurm", choices=("local", "slurm"))
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    nodes: int = setting(1, minimum=1)
    gpus_per_node: int = setting(0, minimum=0)
    cpus_per_node: int | None = setting(None, minimum=1)
    processes_per_node: int | None = setting(None, minimum=1)
    memory: str | None = None
    time: str | None = None
    signal_seconds: int = setting(120, minimum=1, maximum=65535)
    container: ContainerConfig | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    python: str = "python"
    sbatch_options: list[str] = field(default_factory=list)
    srun_options: list[str] = field(default_factory=list)
    hardware: str | None = None

    def processes(self, wanted: int) -> int:
        """On each node, of a run that would like ``wanted`` in all. Raises ConfigError where they
        do not divide."""
        if self.processes_per_node is not None:
            return self.processes_per_node
        if self.gpus_per_node:
            return self.gpus_per_node
        if wanted % self.nodes:
            raise ConfigError(
                f"the run's {wanted} processes do not divide over nodes = {self.nodes}; set "
                "processes_per_node"
            )
        return wanted // self.nodes


def load_cluster(path: str | Path) -> ClusterConfig:
    """Read a cluster's file, or the one of that name in configs/clusters. Raises ConfigError."""
    file = Path(path)
    if not file.suffix and not file.exists():
        file = Path("configs/clusters") / f"{path}.yaml"
    config = load_config(ClusterConfig, file)
    if config.time is not None and not _TIME.fullmatch(config.time):
        raise ConfigError(
            f"{file}: time is '{config.time}', expected Slurm's: minutes, hours:minutes:seconds or "
            "days-hours:minutes:seconds, in quotes"
        )
    return config
