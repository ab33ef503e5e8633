"""Tables with a row per run and any columns, for laws of something else than one loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.curves import Points
from evals.scaling.logs import TABLES, read_frame
from evals.scaling.parameters import Array
from pretrain.common.config_loader import nearest
from pretrain.common.errors import UserError

# By what a column holds: the names by which it is found.
NAMES: dict[str, tuple[str, ...]] = {
    "parameters": ("parameters", "params", "N", "n", "Model Size"),
    "tokens": ("tokens", "D", "d", "Training Tokens"),
    "lr": ("lr", "learning_rate"),
    "batch": ("batch", "batch_tokens", "batch_size", "tokens_per_step"),
    "loss": ("loss", "L", "final_loss"),
    "name": ("name", "run"),
}


class RunTable:
    """A table with a row per run, of which columns are asked for by what they hold.

    ``columns`` maps what they hold to the table's names. Raises UserError for a file that cannot be
    read.
    """

    def __init__(self, path: Path, columns: dict[str, str] | None = None) -> None:
        self.path, self.columns = path, columns or {}
        if path.suffix not in TABLES:
            raise UserError(f"{path}: expected a table, a .csv, .tsv or .parquet file")
        self.frame: Any = read_frame(path)

    def name_of(self, what: str) -> str | None:
        """Return the name of the column that holds ``what``, or None."""
        given = self.columns.get(what)
        if given is not None:
            return self.known(given)
        return next((n for n in NAMES.get(what, ()) if n in self.frame.columns), None)

    def known(self, name: str) -> str:
        """Return ``name``; raises UserError where the table has no such column."""
        if name not in self.frame.columns:
            there = [str(c) for c in self.frame.columns]
            raise UserError(
                f"{self.path}: has no column '{name}'{nearest(name, there)}, found: "
                f"{', '.join(there)}"
            )
        return name

    def numbers(self, what: str) -> Array:
        """Return the column (n,) that holds ``what``; raises UserError where there is none."""
        import pandas

        name = self.name_of(what) or (what if what in self.frame.columns else None)
        if name is None:
            raise UserError(
                f"{self.path}: no column is known as {what}, found: "
                f"{', '.join(map(str, self.frame.columns))}; name it with --columns {what}=NAME"
            )
        found = pandas.to_numeric(self.frame[name], errors="coerce")
        return np.asarray(found.to_numpy(dtype=float))

    @property
    def names(self) -> list[str]:
        """The names of the runs."""
        name = self.name_of("name")
        if name is None:
            return [f"run {i + 1}" for i in range(len(self.frame))]
        return [str(x) for x in self.frame[name]]

    def points(self, loss: str) -> Points:
        """Return the runs with the column ``loss``; raises UserError for unusable numbers."""
        return Points(
            self.numbers("parameters"),
            self.numbers("tokens"),
            self.numbers(loss),
            names=self.names,
            name=self.path.name,
        )


def all_finite(table: RunTable, what: Sequence[str]) -> None:
    """Raise UserError where a column holds something that is not a finite number."""
    for each in what:
        values = table.numbers(each)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            raise UserError(
                f"{table.path}: {each} of {table.names[bad[0]]} is {values[bad[0]]}, expected a "
                "number"
            )
