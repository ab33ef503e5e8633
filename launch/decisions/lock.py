"""The lock of a decision's folder: one launcher goes on with it at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.common import file_lock
from pretrain.common.errors import UserError

_FILE = ".deciding"


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Hold a decision's folder; the system ends it with the process, however that ends.

    Raises UserError where another process holds it, or it cannot be written to.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = file_lock.take(directory / _FILE)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror}") from None
    if handle is None:
        raise UserError(
            f"another process is deciding in {directory}: wait for it, or choose another name"
        )
    try:
        yield
    finally:
        os.close(handle)
