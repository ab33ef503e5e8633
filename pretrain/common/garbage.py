"""When Python looks for garbage: not while modules are imported, and not at a process's end."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the garbage collector, for imports: they make a million objects, and all of them stay.

    That is a tenth of the time that torch takes to import, and more of what comes after it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
