"""Text in pictures of matplotlib."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plot_text(text: str) -> str:
    r"""Return ``text`` such that matplotlib shows it as it is: a name is no formula.

    Between two ``$`` would be one, whose errors end the drawing, and a label that begins with ``_``
    would be left out of legends. What cannot be drawn, such as a line's end, becomes a space.
    """
    shown = text.encode(errors="replace").decode()
    shown = _CONTROL.sub(" ", shown).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
