"""The environment a run was made in: versions, commit, command, hardware."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from pretrain.common.masking import masked, masked_command

_PACKAGES = (
    "hybrid-pretrain",
    "torch",
    "megatron-core",
    "numpy",
    "sentencepiece",
    "torchao",
    "triton",
    "flash-attn",
    "flash-linear-attention",
)


def describe_environment(*, command_and_diff: bool = True) -> dict[str, Any]:
    """Return versions, commit, command and hardware, for the run directory.

    What looks like a key or a password in the command or in uncommitted changes is masked;
    ``command_and_diff`` False leaves both out, as null.
    """
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    command, diff = None, None
    if command_and_diff:
        command = masked_command([sys.executable, *sys.orig_argv[1:]])
        changes = _git("diff", "HEAD")
        diff = changes and masked(changes)
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command,
        "python": platform.python_version(),
        "packages": versions,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": _git("status", "--porcelain", "--untracked-files=no"),
        "git_diff": diff,
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
