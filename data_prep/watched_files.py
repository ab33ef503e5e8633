"""Files that should stay as they are while they are read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class WatchedFiles:
    """The sizes and times of change of some files, to be compared with later."""

    def __init__(self, source: str, paths: Iterable[Path]) -> None:
        self.source = source
        self._states = {path: _state(path) for path in paths}

    def changes(self) -> str | None:
        """Return a sentence that names a file which has changed since, or None."""
        changed = [path for path, state in self._states.items() if _state(path) != state]
        if not changed:
            return None
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        return (
            f"source '{self.source}': {changed[0]}{more} changed while the data was made, so its "
            "text may be partly old and partly new; make the data again with --overwrite"
        )


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
