"""Read tables with a row per run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from evals.scaling.columns import find_column
from evals.scaling.curves import Points
from evals.scaling.logs import TABLES, read_frame
from pretrain.common.errors import UserError

KNOWN = {
    "parameters": ("parameters", "params", "N", "n", "Model Size"),
    "tokens": ("tokens", "D", "d", "Training Tokens"),
    "loss": ("loss", "L", "final_loss"),
    "unique_tokens": ("unique_tokens", "U"),
    "total_parameters": ("total_parameters", "total_params"),
    "flops": ("flops", "FLOPs", "C", "Training FLOP"),
    "name": ("name", "run"),
}
_SIZES = ("parameters", "tokens", "flops")


def read_points(path: Path, columns: Mapping[str, str] | None = None) -> Points:
    """Read a CSV or Parquet table with a row per run.

    Columns are parameters, tokens and loss, and optionally unique_tokens,
    total_parameters, flops and name;
    ``columns`` maps these to the table's names. Of parameters, tokens and flops two suffice, as
    C = 6 N D. Raises UserError for a table that cannot be read or lacks a column.
    """
    import pandas

    frame = read_frame(path)
    found = dict[str, Any]()
    for what, names in KNOWN.items():
        given = (columns or {}).get(what)
        if given is not None and given not in frame.columns:
            names_there = ", ".join(map(str, frame.columns))
            raise UserError(f"{path}: has no column '{given}', found: {names_there}")
        name = given or next((n for n in names if n in frame.columns), None)
        if name is not None:
            found[what] = frame[name]
    numbers = {
        w: pandas.to_numeric(v, errors="coerce").to_numpy(dtype=float)
        for w, v in found.items()
        if w != "name"
    }
    notes = list[str]()
    for what, other in (("tokens", "parameters"), ("parameters", "tokens")):
        if what not in numbers and other in numbers and "flops" in numbers:
            with np.errstate(divide="ignore"):
                numbers[what] = numbers["flops"] / (6 * numbers[other])
            notes.append(f"{what} are computed as C / (6 {'N' if other == 'parameters' else 'D'})")
    missing = [w for w in ("parameters", "tokens", "loss") if w not in numbers]
    if missing:
        raise UserError(
            f"{path}: no column is known as {missing[0]}, found: "
            f"{', '.join(map(str, frame.columns))}; name it with --columns {missing[0]}=NAME"
        )
    finite = np.isfinite(numbers["loss"])
    points = Points(
        numbers["parameters"][finite],
        numbers["tokens"][finite],
        numbers["loss"][finite],
        numbers["unique_tokens"][finite] if "unique_tokens" in numbers else None,
        numbers["flops"][finite] if "flops" in numbers else None,
        [str(x) for x in found["name"][finite]] if "name" in found else (),
        path.name,
        notes,
        numbers["total_parameters"][finite] if "total_parameters" in numbers else None,
    )
    if not finite.all():
        points.warnings.append(f"{int((~finite).sum())} runs without a finite loss were skipped")
    return points


def is_points_table(path: Path, columns: Mapping[str, str] | None = None) -> bool:
    """Return whether a table has a row per run, rather than one per step.

    The columns that are named decide: a step or a learning rate belongs to a curve, parameters,
    FLOPs or unique tokens to runs. Otherwise a table with two of parameters, tokens and FLOPs has
    a row per run, and one with steps only where each row has a name or a size of its own.
    """
    if path.suffix not in TABLES or not path.exists():
        return False
    given = columns or {}
    if any(what in given for what in ("step", "lr", "samples")):
        return False
    if any(what in given for what in ("parameters", "flops", "unique_tokens")):
        return True
    try:
        frame = read_frame(path)
    except UserError:
        return False
    names = [str(name) for name in frame.columns]
    sizes = [next((n for n in KNOWN[w] if n in names), None) for w in _SIZES]
    if sum(size is not None for size in sizes) < 2 or find_column("lr", names, None) is not None:
        return False
    if find_column("step", names, None) is None:
        return True
    name = find_column("name", names, given)
    if name is not None:
        return bool(frame[name].is_unique)
    return sizes[0] is not None and frame[sizes[0]].nunique() > 1
