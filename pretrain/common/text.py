"""Properties of text that people write into settings."""

from __future__ import annotations

import unicodedata


def control_character(text: str) -> str | None:
    """Return the first control character of ``text``, written as an escape, or None."""
    return next((repr(c)[1:-1] for c in text if unicodedata.category(c) == "Cc"), None)
