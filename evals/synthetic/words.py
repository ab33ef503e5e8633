"""Words and sentences that generated texts are made of."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_FOLDER = Path(__file__).parent
NOUNS = tuple((_FOLDER / "nouns.txt").read_text(encoding="utf-8").split())
ADJECTIVES = tuple((_FOLDER / "adjectives.txt").read_text(encoding="utf-8").split())


@cache
def essay_sentences() -> tuple[str, ...]:
    """Return English sentences from the help texts of the language reference that Python carries.

    They replace the essays of RULER's haystacks, which would have to be downloaded.
    """
    from pydoc_data.topics import topics

    found: list[str] = []
    for _, text in sorted(topics.items()):
        for paragraph in text.split("\n\n"):
            if not paragraph.startswith((" ", "*")):
                flat = " ".join(paragraph.split())
                found += re.findall(r"[A-Z][^.!?\"*`\\]{30,200}\.(?= |$)", flat)
    return tuple(dict.fromkeys(s.strip() for s in found))
