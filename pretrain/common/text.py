"""Text that people write into settings, and that they read."""

from __future__ import annotations

import unicodedata


def control_character(text: str) -> str | None:
    """Return the first control character of ``text``, written as an escape, or None."""
    return next((repr(c)[1:-1] for c in text if unicodedata.category(c) == "Cc"), None)


def duration(seconds: float) -> str:
    """Return a time such as ``5:07``, ``3:05:07`` or, from two days on, ``12 days``."""
    if seconds >= 2 * 86400:
        return f"{seconds / 86400:,.0f} days"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
