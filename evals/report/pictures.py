"""Pictures inside the report's page, as few bytes as they look good with."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from PIL import Image

MOST_BYTES = 2_000_000  # of all pictures on a page: others lie beside it
_COLORS = 128  # of a picture: enough for the map of a heat map and its text


class Pictures:
    """The pictures of one page."""

    def __init__(self, most_bytes: int = MOST_BYTES):
        """Begin with none; ``most_bytes`` is what all of them together may take."""
        self._left = most_bytes

    def embed(self, heading: str, path: Path) -> dict[str, str]:
        """Return heading, file name and data of a picture, "" where the page has no room for it."""
        with Image.open(path) as image:
            small = image.convert("RGB").quantize(_COLORS)
        buffer = io.BytesIO()
        small.save(buffer, "PNG", optimize=True)
        data = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(data) > self._left:
            data = ""
        self._left -= len(data)
        return {"heading": heading, "data": data, "name": path.name}
