"""Errors meant for people: one sentence on the screen and exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable

from pretrain.common.files import explain_write_error, is_refused_write

# Of a run that was stopped and saved, which the same command resumes: EX_TEMPFAIL, "try again
# later".
EXIT_STOPPED = 75


class UserError(Exception):
    """Bad input; the message names the field or file, what was found, and what was expected."""


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and exit: 2 with one sentence for a :class:`UserError`.

    The same for what the machine refuses to write, such as on a full disk, and for a standard
    output that takes nothing (without the sentence where its reader, such as head, has ended).
    """
    _open_closed_streams()
    status: int | str | None
    lost: OSError | None = None
    try:
        status = main() or 0
    except SystemExit as end:  # argparse's
        status = end.code
    except UserError as error:
        status = 2
        if os.environ.get("LOCAL_RANK", "0") == "0":  # not once per process under torchrun
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        status = 130
        print("interrupted", file=sys.stderr)
    except OSError as error:
        status = 2
        if error.filename is None and not _takes_output():
            lost, status = error, 1
        elif is_refused_write(error):
            print(f"error: {explain_write_error(error)}", file=sys.stderr)
        else:
            raise
    lost = flush_output() or lost
    if lost is not None:
        status = status or 1
        if not isinstance(lost, BrokenPipeError):
            print(f"error: {unwritable(lost)}", file=sys.stderr)
    gc.freeze()  # or the interpreter, when it ends, looks for garbage among all that was imported
    raise SystemExit(status)


def _takes_output() -> bool:
    """Return whether standard output can be written to: the probe is an empty line."""
    try:
        os.write(sys.stdout.fileno(), b"\n")
    except OSError:
        return False
    return True


def flush_output() -> OSError | None:
    """Flush standard output; return what keeps it from being written, which is then dropped.

    What was printed before would otherwise fail once more, and change the exit status, when the
    interpreter ends.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None


def unwritable(error: OSError) -> str:
    """Return that standard output cannot be written to, and why."""
    return f"standard output cannot be written to: {error.strerror or error}"


def _open_closed_streams() -> None:
    """Open standard streams that the caller closed, or the next file opened would be one of them.

    Standard output then fails when it is written to, so that nothing is lost without a word.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # gets the lowest number that is free: this one
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
