"""Monte Carlo tree search over layer paths (arXiv 2507.07996)."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from evals.layer_paths.space import Path, edited

_TRIES = 200  # of drawing an edit that was not seen


@dataclass
class _Node:
    path: Path
    parent: _Node | None = None
    children: list[_Node] = field(default_factory=list)
    visits: int = 0
    best: float = 0.0

    def value(self, exploration: float, length_penalty: float, num_blocks: int) -> float:
        assert self.parent is not None
        explored = exploration * math.sqrt(math.log(self.parent.visits) / self.visits)
        return self.best + explored - length_penalty * len(self.path) / num_blocks


def search_paths(
    identity: Path,
    reward: Callable[[Path], float],
    *,
    evaluations: int,
    seed: int = 0,
    exploration: float = 0.3,
    length_penalty: float = 0.05,
    allowed: Callable[[Path], bool] = lambda _: True,
) -> dict[Path, float]:
    """Return the reward of every path tried, the identity first.

    ``reward`` is from 0 to 1 and is asked once for each path. A node is a path, an edge an edit
    that leaves out or repeats up to four neighbours; a node of v visits has up to the square root
    of v children (progressive widening), of which that with the largest
    ``Q + exploration sqrt(ln N / n) - length_penalty length / blocks`` is followed. Q is the best
    reward at and below the node, not their mean: a path's reward is the same every time, and most
    edits of a good path are bad. Paths are at most twice as long as the identity.
    """
    draw, num_blocks = random.Random(seed), len(identity)
    root = _Node(identity)
    seen = {identity: reward(identity)}
    _back_up(root, seen[identity])
    for _ in range(evaluations):
        node = root
        while len(node.children) >= math.ceil(math.sqrt(node.visits)) and node.children:
            node = max(
                node.children, key=lambda n: n.value(exploration, length_penalty, num_blocks)
            )
        path = _new_edit(node.path, seen, draw, 2 * num_blocks, allowed)
        if path is None:  # nothing new near it: the search sees that it has been here again
            _back_up(node, seen[node.path])
            continue
        seen[path] = reward(path)
        child = _Node(path, node)
        node.children.append(child)
        _back_up(child, seen[path])
    return seen


def _new_edit(
    path: Path,
    seen: dict[Path, float],
    draw: random.Random,
    longest: int,
    allowed: Callable[[Path], bool],
) -> Path | None:
    for _ in range(_TRIES):
        found = edited(path, draw, longest)
        if found not in seen and allowed(found):
            return found
    return None


def _back_up(node: _Node | None, value: float) -> None:
    while node is not None:
        node.visits += 1
        node.best = max(node.best, value)
        node = node.parent
