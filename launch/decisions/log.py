"""The log of a decision: a line for each step, chained by hashes, whenever it is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from evals.scaling.decide import Run, Step
from evals.scaling.decide.record import LOG, PLAN, hash_of, read_plan
from pretrain.common.errors import UserError
from pretrain.common.files import write_json

_DIGITS = 9


def line_of(step: Step, done: Sequence[Run], digest: str, before: str) -> str:
    """Return the line of a step; nothing in it depends on when or where it was made."""
    row: dict[str, Any] = {
        "before": before,
        "plan": digest,
        "runs": [_run(run) for run in done],
        "spent": _round(step.spent),
        "reason": step.reason,
        "left": step.left,
        "unstable": step.unstable,
        "taken": [_run(run)[:4] for run in step.taken.runs] if step.taken else None,
    }
    if step.posterior is not None:
        posterior = step.posterior
        row["best"] = {arm: _round(p) for arm, p in sorted(posterior.best().items())}
        row["worth"] = {
            f"{a} over {b}": [_round(posterior.quantile(a, b, q)) for q in (0.025, 0.5, 0.975)]
            for a, b in combinations(sorted(posterior.observations.arms), 2)
        }
        row["sizes"] = {name: _round(value) for name, value in posterior.sizes().items()}
        row["draws"] = _round(posterior.effective)
    row["candidates"] = [
        [list(s.candidate.arms), *s.candidate.cell, _round(s.candidate.cost), _round(s.gain)]
        for s in step.scored
    ]
    row["verdicts"] = [
        [v.kind, *v.pair, _round(v.probability), _round(v.low), _round(v.middle), _round(v.high)]
        for v in step.verdicts
    ]
    return json.dumps(row, allow_nan=False)


def append(directory: Path, line: str, old: Sequence[Mapping[str, Any]]) -> None:
    """Add a line behind the complete ones, on the disk before it returns."""
    import os

    path = directory / LOG
    content = path.read_bytes() if path.exists() else b""
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(content.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(file.fileno())
    assert len(old) == content[: content.rfind(b"\n") + 1].count(b"\n")


def last_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the hash of the last line, empty for none."""
    return hash_of(json.dumps(rows[-1])) if rows else ""


def write_plan(directory: Path, content: Mapping[str, Any], digest: str) -> None:
    """Write the plan before the first run; raise UserError where another one stands."""
    path = directory / PLAN
    if path.exists():
        _, found = read_plan(directory)
        if found != digest:
            raise UserError(
                f"{path} has the plan {found}, expected {digest}: the file or the project changed "
                "since; choose another name"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, "hash": digest})


def as_logged(runs: Sequence[Run]) -> list[Run]:
    """Return runs with their values as the log has them, so that a resumed decision is the same."""
    return [
        replace(run, value=_round(run.value)) if math.isfinite(run.value) else run for run in runs
    ]


def _run(run: Run) -> list[Any]:
    value = _round(run.value) if math.isfinite(run.value) else None
    return [run.arm, run.parameters, run.tokens, run.seed, value]


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
