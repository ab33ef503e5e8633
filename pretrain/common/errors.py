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
    """Run a command's ``main`` and exit: 2 with one sentence for a :class:`UserError`."""
    try:
        status = main()
    except UserError as error:
        _say(f"error: {error}")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    gc.freeze()  # or the interpreter, when it ends, looks for garbage among all that was imported
    raise SystemExit(status or 0)


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
