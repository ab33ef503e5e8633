"""Types of command-line options, for argparse: what is wrong with a value is one sentence."""

from __future__ import annotations

import argparse


def positive(text: str) -> int:
    """Return the whole number that an option is given, from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from 1")
    return int(text)


def count(text: str) -> int:
    """Return the whole number that an option is given, from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"found '{text}', expected a whole number from 0")
    return int(text)
