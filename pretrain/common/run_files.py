"""The files that tell a run's directory from others, for packages that handle no runs."""

from __future__ import annotations

from pathlib import Path

CONFIG_FILE = "config.yaml"  # of a run, and of each of its checkpoints
CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints
METRICS_FILE = "metrics.jsonl"  # of a run that has begun
LAUNCH_CONFIG_FILE = "launch.yaml"  # of one that was launched


def run_around(folder: Path) -> Path | None:
    """Return the run directory that ``folder`` is or lies in, or None."""
    resolved = folder.resolve()
    for each in (resolved, *resolved.parents):
        if (each / METRICS_FILE).exists() or (each / LAUNCH_CONFIG_FILE).exists():
            return each
    return None
