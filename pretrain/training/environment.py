"""The environment a run was made in: versions, commit, command, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "hybrid-pretrain",
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "triton",
    "flash-attn",
    "flash-linear-attention",
)


def describe_environment() -> dict[str, Any]:
    """Return versions, commit, command and hardware, for the run directory."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([sys.executable, *sys.orig_argv[1:]]),
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
        "git_diff": _git("diff", "HEAD"),
        "host": platform.node(),
        "cpus": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    if not (
        root / ".git"
    ).exists():  # installed: git would tell of a repository that lies around it
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
