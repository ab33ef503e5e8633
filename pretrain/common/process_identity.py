"""The identity of a process: its id alone may belong to another one by the time it is used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

# A start time is computed from the clock, which may have been set meanwhile.
_TOLERANCE_SECONDS = 2.0


def identity_of(pid: int) -> dict[str, Any]:
    """Return the ``pid``, ``host`` and start time (``born``, seconds since 1970) of a process.

    ``born`` is None where the process has ended already.
    """
    import psutil

    try:
        born: float | None = psutil.Process(pid).create_time()
    except psutil.Error:
        born = None
    return {"pid": pid, "host": os.uname().nodename, "born": born}


def send_signal(identity: Mapping[str, Any], number: int) -> bool:
    """Send a signal to the process that ``identity`` is of, if it is on this machine and lives.

    Returns whether it does. No other process that has its id by now gets the signal.
    """
    import psutil

    pid, born = identity.get("pid"), identity.get("born")
    if identity.get("host") != os.uname().nodename:
        return False
    if not isinstance(pid, int) or not isinstance(born, int | float):
        return False
    try:
        process = psutil.Process(pid)
        if abs(process.create_time() - born) > _TOLERANCE_SECONDS:
            return False
        process.send_signal(number)
    except psutil.Error:
        return False
    return True
