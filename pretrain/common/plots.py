"""Text in pictures of matplotlib."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def plot_text(text: str, most: int | None = None) -> str:
    r"""Return ``text`` such that matplotlib shows it as it is: a name is no formula.

    Between two ``$`` would be one, whose errors end the drawing, and a label that begins with ``_``
    would be left out of legends. What cannot be drawn, such as a line's end, becomes a space. Of a
    text longer than ``most`` the middle is left out.
    """
    shown = text.encode(errors="replace").decode()
    if most is not None and len(shown) > most:
        shown = f"{shown[: most // 2]}…{shown[-(most - most // 2 - 1) :]}"
    shown = _CONTROL.sub(" ", shown).replace("$", r"\$")
    return f"\u200b{shown}" if shown.startswith("_") else shown
