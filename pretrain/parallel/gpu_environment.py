"""Set what a process that uses a GPU reads from its environment, before CUDA starts."""

from __future__ import annotations

import functools
import os
import socket
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path


@functools.cache
def prepare_gpu() -> None:
    """Set the environment of a process on a GPU, at the first call; see the function below."""
    set_gpu_environment()


def set_gpu_environment() -> None:
    """Set these variables where they are not set: of memory, compiled kernels, and the network.

    Memory in segments that grow does not break up where the lengths of documents vary. Kernels are
    compiled once on a node, not read from a home folder that all nodes share. Gloo, beside NCCL,
    connects nodes of several networks over the one that NCCL is told to use.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
    missing = caches.keys() - os.environ.keys()
    folder = _kernel_folder() if missing else None
    if folder is not None:
        os.environ.update({name: str(folder / caches[name]) for name in missing})
    interface = gloo_interface(
        os.environ.get("NCCL_SOCKET_IFNAME", ""), [name for _, name in socket.if_nameindex()]
    )
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def gloo_interface(wanted: str, interfaces: Sequence[str]) -> str | None:
    """Return the interface that ``NCCL_SOCKET_IFNAME`` admits, or None unless it is exactly one.

    ``wanted`` is its value: beginnings of names, after ``=`` full names, after ``^`` or ``^=``
    those that are not to be used; a port that follows a colon does not matter here.
    """
    others = wanted.startswith("^")
    exact = wanted[others:].startswith("=")
    parts = [part.split(":")[0] for part in wanted[others + exact :].split(",")]
    names = tuple(filter(None, parts))
    if not names:
        return None
    named = {i for i in interfaces if (i in names if exact else i.startswith(names))}
    found = set(interfaces) - named - {"lo"} if others else named
    return found.pop() if len(found) == 1 else None


def _kernel_folder() -> Path | None:
    """Return a folder of this user's on the local disk, which stays there; None without one."""
    folder = Path(tempfile.gettempdir()) / f"pretrain-kernels-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # Anyone may make a folder of this name there, with other code in it.
    ours = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
    return folder if ours and not found.st_mode & 0o022 else None
