"""The folder of a process whose optimizer state is in files."""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import shutil
import uuid
from pathlib import Path

from pretrain.common.errors import UserError
from pretrain.config import ParallelConfig

# float32: weight, two moments, gradient.
_BYTES = 16


def make_offload_folder(parallel: ParallelConfig, parameters: int) -> Path:
    """Make a folder in ``parallel.offload_path`` for the state of so many ``parameters``.

    It is removed when the process ends. A killed process leaves its folder, which the next run
    there removes: nobody holds its lock.

    Raises UserError where DeepSpeed cannot read and write files, the folder cannot be made, or
    there is no room for what this machine's processes need; DeepSpeed notices no failing write.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "parallel.offload is nvme, for which DeepSpeed compiles its asynchronous reading and "
            "writing; that needs a C++ compiler and libaio (apt install libaio-dev), or offload=cpu"
        )
    path = Path(str(parallel.offload_path))
    try:
        path.mkdir(parents=True, exist_ok=True)
        for lock in path.glob("optimizer-*.lock"):
            _remove_left_over(lock)
        _check_room(path, parameters)
        folder = path / f"optimizer-{uuid.uuid4().hex[:12]}"
        lock, new = folder.with_suffix(".lock"), folder.with_suffix(".new")
        # Named when it is locked, so that nobody takes it for a left-over; held until the end.
        fcntl.flock(os.open(new, os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX)
        folder.mkdir()
        new.rename(lock)
    except OSError as error:
        raise UserError(f"parallel.offload_path: {path}: cannot be written ({error})") from None
    atexit.register(_remove, lock)
    return folder


def _check_room(path: Path, parameters: int) -> None:
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free, needed = shutil.disk_usage(path).free, _BYTES * parameters * here
    if free < needed:
        raise UserError(
            f"parallel.offload_path: {path}: {free / 1e9:.1f} GB are free, expected at least "
            f"{needed / 1e9:.1f} GB for the optimizer's state of {here} processes"
        )


def _remove_left_over(lock: Path) -> None:
    with contextlib.suppress(OSError):  # in use, or another process was first
        file = os.open(lock, os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(lock)
        finally:
            os.close(file)


def _remove(lock: Path) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)
