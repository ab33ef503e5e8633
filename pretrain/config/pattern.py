"""The pattern language: which mixer each block has, in a line.

    pattern := item+        item := [COUNT "*"] (NAME | "(" pattern ")")

``6*(3*gdn attn)`` is 24 blocks: three ``gdn``, one ``attn``, six times over.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from pretrain.common.config_loader import nearest

_TOKEN = re.compile(r"\s*(?:(?P<count>\d+)\s*\*|(?P<name>[A-Za-z_]\w*)|(?P<mark>[()]))")
_MAX_BLOCKS = 10_000
_MAX_DEPTH = 20


def parse_pattern(pattern: str, known: Collection[str]) -> list[str]:
    """Return the mixer names of all blocks, first to last.

    Raises ValueError, saying where, for an unknown name, a count of 0 or a misplaced bracket.
    """
    names, position = _parse(pattern, 0, sorted(known), depth=0)
    if position < len(pattern.rstrip()):
        raise ValueError(f"pattern '{pattern}': ')' without '(' at character {position + 1}")
    return names


def _parse(pattern: str, position: int, known: list[str], depth: int) -> tuple[list[str], int]:
    names: list[str] = []
    while position < len(pattern.rstrip()):
        count, start = 1, position
        token = _TOKEN.match(pattern, position)
        if token and token["count"]:
            count, position = int(token["count"]), token.end()
            if count > _MAX_BLOCKS:
                raise ValueError(f"pattern '{pattern}': more than {_MAX_BLOCKS} blocks")
            if count == 0:
                raise ValueError(f"pattern '{pattern}': a count of 0 at character {start + 1}")
            token = _TOKEN.match(pattern, position)
        if token is None or token["count"] or (token["mark"] == ")" and position > start):
            raise ValueError(
                f"pattern '{pattern}': expected a mixer name, a count and '*', or '(' "
                f"at character {position + 1}"
            )
        if token["mark"] == ")":
            break
        if token["mark"] == "(":
            if depth == _MAX_DEPTH:
                raise ValueError(f"pattern '{pattern}': brackets more than {_MAX_DEPTH} deep")
            inner, position = _parse(pattern, token.end(), known, depth + 1)
            closing = _TOKEN.match(pattern, position)
            if closing is None or closing["mark"] != ")":
                raise ValueError(
                    f"pattern '{pattern}': '(' at character {token.end()} is not closed"
                )
            position = closing.end()
        else:
            if token["name"] not in known:
                raise ValueError(
                    f"pattern '{pattern}': unknown mixer '{token['name']}'"
                    f"{nearest(token['name'], known)}; known: {', '.join(known)}"
                )
            inner, position = [token["name"]], token.end()
        names += count * inner
        if len(names) > _MAX_BLOCKS:
            raise ValueError(f"pattern '{pattern}': more than {_MAX_BLOCKS} blocks")
    if not names:
        raise ValueError(f"pattern '{pattern}': nothing at character {position + 1}")
    return names, position
