"""Print for people: names are text, tables break between words, numbers look alike."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from rich.console import Console
from rich.table import Column, Table

_NARROWEST = 12  # characters that a column of names keeps at least
_MOST_ZEROS, _MOST_DIGITS = 7, 13  # of numbers that are written out


def plain_console(**options: Any) -> Console:
    """Return a console that shows every string as it is.

    A name such as ``[red]`` or ``:smile:`` is text: neither markup nor the code of an emoji. Styles
    are given to ``print`` and ``add_row``. ``options`` are those of ``rich.console.Console``.
    """
    return Console(markup=False, emoji=False, highlight=False, **options)


def titled_table(title: str | None, *columns: str, left: Collection[str] = ()) -> Table:
    """Return an empty table with these columns, aligned right but for the first and ``left``."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        names = index == 0 or column in left
        table.add_column(column, justify="left" if names else "right", overflow="fold")
    return table


def show_table(table: Table, console: Console | None = None) -> None:
    """Print a table of strings as wide as the screen, or as its words need where that is more."""
    console = console or plain_console()
    console.print(fit_table(table, console.width), crop=False)


def fit_table(table: Table, room: int) -> Table:
    """Set the widths of a table's columns for a screen of ``room`` characters, and return it.

    What is too wide is broken between words, and where that does not suffice inside names, which
    are aligned left.
    """
    most, least = [], []
    for column in table.columns:
        texts = [str(column.header), *map(str, column.cells)]
        lines = [line for text in texts for line in text.splitlines()]
        most.append(max(map(len, lines), default=0))
        least.append(_least_width(column, texts))
    frame = 3 * len(table.columns) + 1
    widths = list(most)
    order = sorted(range(len(widths)), key=lambda i: (table.columns[i].justify == "left", -most[i]))
    for i in order:
        excess = sum(widths) + frame - room
        if excess > 0:
            widths[i] = max(widths[i] - excess, least[i])
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    table.width = sum(widths) + frame  # more than the screen has, rather than break numbers
    return table


def _least_width(column: Column, texts: list[str]) -> int:
    words = [len(word) for text in texts for word in text.split()]
    if column.justify != "left":
        return max(words, default=0)
    headers = [len(word) for word in str(column.header).split()]
    return max([min(max(words, default=0), _NARROWEST), *headers])


def readable(value: float, digits: int = 3) -> str:
    """Return a number with ``digits`` significant figures or more: 11,550; 0.0012; 3.2e+21.

    Only what would be hard to read has an exponent, so that those of one column look alike.
    """
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    size = math.floor(math.log10(abs(value)))
    if not -_MOST_ZEROS <= size < _MOST_DIGITS:
        return f"{value:.{digits}g}"
    decimals = max(digits - 1 - size, 0)
    text = f"{value:,.{decimals}f}"
    return text.rstrip("0").rstrip(".") if decimals else text
