"""Write what a command found: a JSON file and a picture beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.common.files import write_json


def written(out: Path, name: str, saved: dict[str, Any], draw: Callable[[Path], Path]) -> int:
    """Write ``name``.json and its picture to the folder, say so, and return the exit status 0."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", saved)
    picture = draw(out / f"{name}.png")
    print(f"written to {out / f'{name}.json'} and {picture}")
    return 0
