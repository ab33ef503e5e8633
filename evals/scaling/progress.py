"""Say how far a long computation is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
FIRST, TERMINAL, FILE = 2.0, 0.5, 15.0  # seconds until the first line, and between two


def counted(items: Iterable[T], total: int, what: str) -> Iterator[T]:
    """Yield ``items``, and print to stderr how many of ``total`` are there, if it takes long.

    A terminal has one line, which disappears in the end; a file has a line every some seconds.
    """
    stream = sys.stderr
    terminal = stream is not None and stream.isatty()
    due, shown = time.monotonic() + FIRST, False
    for count, item in enumerate(items, 1):
        now = time.monotonic()
        if stream is not None and now >= due and count < total:
            text = f"{what}: {count:,} of {total:,}"
            print(f"\r{text}" if terminal else text, end="" if terminal else "\n", file=stream)
            stream.flush()
            due, shown = now + (TERMINAL if terminal else FILE), True
        yield item
    if shown and terminal:
        print("\r" + " " * (len(what) + 24) + "\r", end="", file=stream, flush=True)
