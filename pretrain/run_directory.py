"""``metrics.jsonl`` of a run directory, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl that are whole and tell their step and tokens."""
    rows = []
    for line in (directory / "metrics.jsonl").read_text(errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and all(isinstance(row.get(k), int) for k in ("step", "tokens")):
            rows.append(row)
    return rows
