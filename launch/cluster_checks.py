"""Checks of a cluster's settings: what sbatch would refuse, or read as something else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pretrain.common.config_loader import ConfigError
from pretrain.common.text import control_character

if TYPE_CHECKING:
    from launch.cluster import ClusterConfig

_NAMES = re.compile(r"[\w.@+-]+(,[\w.@+-]+)*", re.ASCII)
_MEMORY = re.compile(r"\d+([KMGT]B?)?", re.IGNORECASE | re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_UNLIMITED = ("unlimited", "infinite")
_VARIABLE = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_OPTION = re.compile(r"--?([A-Za-z][\w-]*)(=.*)?", re.ASCII)
# Options of sbatch that a setting stands for, or that the script sets itself (None).
_OWN_OPTIONS = {
    **{name: name for name in ("partition", "account", "qos", "constraint", "nodes", "time")},
    **{"p": "partition", "A": "account", "q": "qos", "C": "constraint", "N": "nodes", "t": "time"},
    "gpus-per-node": "gpus_per_node",
    "cpus-per-task": "cpus_per_node",
    "c": "cpus_per_node",
    "mem": "memory",
    "signal": "signal_seconds",
    **dict.fromkeys(("job-name", "J", "array", "a", "output", "o", "open-mode"), None),
    **dict.fromkeys(("ntasks-per-node", "requeue", "no-requeue", "wrap"), None),
}


def check_cluster(cluster: ClusterConfig, where: str) -> None:
    """Raise ConfigError, beginning with ``where``, for what sbatch would refuse or misread."""
    for name, value in _texts(cluster):
        found = control_character(value)
        if found is not None:
            raise ConfigError(
                f"{where}: {name} is {value!r}, expected text without control characters "
                f"such as {found}"
            )
    for name in ("partition", "account", "qos"):
        value = getattr(cluster, name)
        if value is not None and not _NAMES.fullmatch(value):
            raise ConfigError(
                f"{where}: {name} is '{value}', expected a name of letters, digits and "
                "_ . - + @, or several with commas between"
            )
    if cluster.memory is not None and not _MEMORY.fullmatch(cluster.memory):
        raise ConfigError(
            f"{where}: memory is '{cluster.memory}', expected Slurm's format: a whole "
            "number of megabytes, or with a unit of K, M, G or T, such as 64G; 0 for all"
        )
    _check_time(cluster, where)
    for name in cluster.environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                f"{where}: environment has '{name}', expected the name of a variable: "
                "letters, digits and _, no digit first"
            )
    for name in ("sbatch_options", "srun_options"):
        for option in getattr(cluster, name):
            _check_option(name, option, where)


def _texts(cluster: ClusterConfig) -> Iterator[tuple[str, str]]:
    """Yield the name and text of every setting that becomes a word of the script."""
    for name in ("partition", "account", "qos", "constraint", "memory", "time", "python"):
        if getattr(cluster, name) is not None:
            yield name, getattr(cluster, name)
    for name in ("modules", "sbatch_options", "srun_options"):
        yield from ((f"{name}[{i}]", text) for i, text in enumerate(getattr(cluster, name)))
    if cluster.container is not None:
        yield "container.image", cluster.container.image
        yield from ((f"container.mounts[{i}]", x) for i, x in enumerate(cluster.container.mounts))


def _check_time(cluster: ClusterConfig, where: str) -> None:
    if cluster.time is None or cluster.time.lower() in _UNLIMITED:
        return
    seconds = time_limit_seconds(cluster.time)
    if seconds is None:
        raise ConfigError(
            f"{where}: time is '{cluster.time}', expected Slurm's format in quotes: "
            "minutes, hours:minutes:seconds or days-hours:minutes:seconds"
        )
    if 0 < seconds <= cluster.signal_seconds:
        raise ConfigError(
            f"{where}: signal_seconds is {cluster.signal_seconds}, expected less than "
            f"the {seconds} seconds of time = '{cluster.time}': the run would save and queue again "
            "before it trains"
        )


def time_limit_seconds(text: str) -> int | None:
    """Return the seconds of a time limit as Slurm writes it; None where it is no such thing."""
    found = _TIME.fullmatch(text)
    if found is None:
        return None
    days, *rest = found.groups()
    numbers = [int(x) for x in rest if x is not None]
    if days is not None:  # days-hours, days-hours:minutes, ...
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + seconds
    if len(numbers) == 1:
        return 60 * numbers[0]
    hours, minutes, seconds = numbers if len(numbers) == 3 else (0, *numbers)
    return (hours * 60 + minutes) * 60 + seconds


def _check_option(name: str, option: str, where: str) -> None:
    found = _OPTION.fullmatch(option)
    if found is None:
        raise ConfigError(
            f"{where}: {name} has '{option}', expected one option in each entry, with an "
            "= before its value, such as '--gres=gpu:8'"
        )
    own = found[1]
    if not option.startswith("--") and len(own) > 1:
        raise ConfigError(
            f"{where}: {name} has '{option}', expected the long form, such as --partition=debug: "
            "Slurm takes what follows one letter for its value"
        )
    if name == "sbatch_options":
        own = _meant(own)
    if name == "sbatch_options" and own in _OWN_OPTIONS:
        setting = _OWN_OPTIONS[own]
        instead = f"set {setting} instead" if setting else "the script sets it itself"
        raise ConfigError(f"{where}: {name} has '{option}': {instead}")


def _meant(option: str) -> str:
    """Return the option of the script that sbatch takes a shortened one for, or ``option``."""
    if option in _OWN_OPTIONS or option in ("gpus", "ntasks") or len(option) == 1:
        return option
    return next((own for own in _OWN_OPTIONS if own.startswith(option)), option)
