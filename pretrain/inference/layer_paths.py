"""Layer paths: blocks of a trained model left out, repeated or reordered at inference.

Chain-of-Layers (arXiv 2507.07996). Keys, values and recurrent states are kept for each occurrence
of a block in the path, so the path of all blocks in order is the model itself, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

from pretrain.common.errors import UserError
from pretrain.model.block import Block
from pretrain.model.language_model import LanguageModel

MOST = 10_000  # blocks of a path


def parse_path(text: str, num_blocks: int) -> tuple[int, ...]:
    """Return the blocks of a path such as ``0-3,2-3,5``, counted from 0.

    Raises UserError where it is no path through ``num_blocks`` blocks.
    """
    path: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() if dash else True)):
            raise UserError(
                f"the layer path '{text}' has '{part}', expected numbers of blocks and ranges of "
                "them, such as 0-3,2-3,5"
            )
        ends = int(first), int(last or first)
        if max(ends) >= num_blocks:
            raise UserError(
                f"the layer path '{text}' names block {max(ends)}, but the model's blocks are 0 to "
                f"{num_blocks - 1}"
            )
        step = 1 if ends[1] >= ends[0] else -1
        path += range(ends[0], ends[1] + step, step)
        if len(path) > MOST:
            raise UserError(f"the layer path has more than {MOST:,} blocks")
    return tuple(path)


def path_text(path: Sequence[int]) -> str:
    """Return a path as :func:`parse_path` reads it, neighbours in order as ranges."""
    starts = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(path)) if b != a + 1), len(path)]
    runs = [path[a:b] for a, b in pairwise(starts)]
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)


def set_path(model: LanguageModel, path: Sequence[int] | None) -> None:
    """Have ``model`` run these blocks in this order from now on; None: as it was trained.

    Raises UserError for a model with a loop of its own, and for a path on which a block comes
    before the one whose values it takes.
    """
    if path is None:
        model.layer_path = None
        return
    if model.recursion is not None:
        raise UserError(
            "a layer path is given, but the model has a loop of its own: --recurrences sets its "
            "passes"
        )
    handed: set[str] = set()
    for index in path:
        block = cast(Block, model.blocks[index])
        if block.later and block.kind not in handed:
            raise UserError(
                f"the layer path {path_text(path)} runs block {index} before the first block of "
                f"'{block.kind}', whose values it takes"
            )
        if block.hands_on and not block.later:
            handed.add(block.kind)
    model.layer_path = tuple(path)
