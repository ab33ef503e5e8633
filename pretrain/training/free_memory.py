"""The memory that a process may fill: of its GPU, or its share of what the machine has left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

# (Folder of a kind of control groups, its files of the limit and of what is used, and what precedes
# the names of memory.stat), of versions 2 and 1.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
_DROPPABLE = ("active_file", "inactive_file")  # of what is used: pages of files, such as data read


def free_memory() -> float:
    """Return the bytes that this process may allocate on its device.

    On CPUs that is an even share, among the run's processes on this machine, of what the system has
    left, within the limits of a container or a Slurm job.
    """
    if torch.cuda.is_available():
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return float(torch.cuda.mem_get_info()[0] + unused)  # an earlier run may have left it
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min([float(psutil.virtual_memory().available), *_left_in_groups()]) / processes


def free_on_gpus() -> float:
    """Return the bytes that are free on the GPU with the fewest, without using one from here.

    Another process looks: a process that has asked keeps some of the memory until it ends. Without
    an answer it is infinite.
    """
    program = "import torch; n = torch.cuda.device_count(); "
    program += "print(min(torch.cuda.mem_get_info(i)[0] for i in range(n)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    return float(done.stdout) if done.returncode == 0 else float("inf")


def _left_in_groups() -> Iterator[float]:
    """Yield what is left within each limit on memory that this process is under."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return
    paths = {line.split(":", 2)[2] for line in lines if line.split(":", 2)[1] in ("", "memory")}
    for root, limit_file, used_file, prefix in _CONTROL_GROUPS:
        for path in paths:
            group = Path(root + path)
            for folder in (group, *group.parents):
                if not folder.is_relative_to(root):
                    break
                try:
                    limit = (folder / limit_file).read_text().strip()
                    used = int((folder / used_file).read_text())
                    rows = (folder / "memory.stat").read_text().splitlines()
                    kept = dict(row.split() for row in rows)
                except (OSError, ValueError):
                    continue
                if limit != "max":
                    files = sum(int(kept.get(prefix + name, 0)) for name in _DROPPABLE)
                    yield float(int(limit) - used + files)
