"""Settings over settings, as nested mappings."""

from __future__ import annotations

from typing import Any


def merged(below: Any, above: Any) -> Any:
    """Return what ``above`` says, and of mappings also what ``below`` alone says."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}
