"""torchrun without its own report: ``python -m pretrain.parallel.torchrun`` takes its arguments.

The processes of a run say themselves why they end, in one sentence; torchrun would add a traceback
of its own and exit with status 1. This exits with the status of the process that ended first, and
names one that a signal has killed, which could say nothing.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping
from typing import Any


def main() -> int:
    """Run torchrun with the arguments of ``sys.argv``; return the exit status."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # that processes failed, and that the others are ended
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        return report(error.failures)
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


def report(failures: Mapping[int, Any]) -> int:
    """Return the exit status of a run whose processes failed so, by rank; name one that was killed.

    ``failures`` are torchrun's, with an ``exitcode``, below 0 for a signal, and a ``timestamp``.
    Those that torchrun has ended itself do not count beside others.
    """
    ordered = sorted(failures.items(), key=lambda item: item[1].timestamp)
    first = [item for item in ordered if item[1].exitcode != -signal.SIGTERM] or ordered
    rank, failure = first[0]
    if failure.exitcode >= 0:
        return int(failure.exitcode)
    name = signal.Signals(-failure.exitcode).name
    hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
    print(f"error: process {rank} was ended by {name}{hint}", file=sys.stderr)
    return 128 - int(failure.exitcode)


if __name__ == "__main__":
    raise SystemExit(main())
