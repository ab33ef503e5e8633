"""Rows of the tables of ``benchmarks/data/planner``; messages name the line and column."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from pretrain.common.errors import UserError


class LeftOut(Exception):
    """Why a row is left out."""


class Row(dict[str, str]):
    """A row of a table, whose values are read with messages that name the line and column."""

    where: str

    def number(self, column: str) -> float | None:
        """Return a positive number; None where the cell is empty."""
        text = self[column]
        if not text:
            return None
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise UserError(f"{self.where}, {column}: '{text}', expected a positive number")
        return value

    def whole(self, column: str, default: int | None = None) -> int:
        """Return a whole number; the row is left out where it is not known and has no default."""
        value = self.number(column)
        if value is None:
            if default is None:
                raise LeftOut(f"{column} is not known")
            return default
        if value != int(value):
            raise UserError(f"{self.where}, {column}: '{self[column]}', expected a whole number")
        return int(value)

    def one_of(self, column: str, *expected: str) -> str:
        """Return a word; the first one expected where the cell is empty."""
        text = self[column] or expected[0]
        if text not in expected:
            raise UserError(
                f"{self.where}, {column}: '{text}', expected one of: {', '.join(expected)}"
            )
        return text


def table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of a file with a header; UserError where one of ``columns`` is missing."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            lines = [(reader.line_num, line) for line in reader]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected a table as README.md has it") from None
    names = reader.fieldnames or ()
    missing = [column for column in columns if column not in names]
    if missing:
        raise UserError(f"{path}: no column '{missing[0]}'; expected a table as README.md has it")
    for number, line in lines:
        if None in line or None in line.values():
            raise UserError(
                f"{path}, line {number}: more or fewer cells than the {len(names)} columns; "
                "is a comma in a cell without quotes?"
            )
        row = Row(line)
        row.where = f"{path}, line {number}"
        if not row["id"]:
            raise UserError(f"{row.where}, id: empty, expected a name")
        yield row
