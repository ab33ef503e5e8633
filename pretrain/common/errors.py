"""Errors meant for people: one sentence on the screen and exit status 2, no traceback."""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pretrain.common.files import explain_write_error, is_refused_write

# Of a run that was stopped and saved, which the same command resumes: EX_TEMPFAIL, "try again
# later".
EXIT_STOPPED = 75


class UserError(Exception):
    """Bad input; the message names the field or file, what was found, and what was expected."""


class ConfigError(UserError):
    """A configuration that cannot be used."""


class UnknownSettingError(ConfigError):
    """A setting that the schema does not have."""


def short(value: Any, text: Callable[[Any], str] = repr) -> str:
    """Return a value for a sentence: its middle left out where it is long."""
    words = text(value)
    return words if len(words) <= 200 else f"{words[:120]} ... {words[-60:]}"


def nearest(name: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)``, or an empty string when no known name is near."""
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean '{match[0]}'?)" if match else ""


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
        _say(f"error: {error}")
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


def _say(sentence: str) -> None:
    """Print why a command ends: under torchrun once per machine, by the process that is first.

    Not by a fixed one: torchrun ends the others when one has ended, whether they have spoken or
    not. Its own report, many lines later, then ends with the sentence as well.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(sentence, file=sys.stderr)
        return
    extra = {"py_callstack": sentence, "timestamp": str(int(time.time()))}
    with contextlib.suppress(OSError):
        Path(report).write_text(json.dumps({"message": {"message": sentence, "extraInfo": extra}}))
    try:
        (Path(report).parents[1] / "said").touch(exist_ok=False)  # in a folder of this start alone
    except FileExistsError:
        return
    except OSError:
        pass
    print(sentence, file=sys.stderr, flush=True)
