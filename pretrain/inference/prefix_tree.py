"""Sequences with common beginnings, as a tree: shared prefixes are computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

# Tokens that a node must save to be worth a separate pass.
_WORTHWHILE = 16


@dataclass
class Node:
    """A piece of some sequences.

    Attributes:
        tokens: The piece, never empty.
        children: The pieces that follow it.
        ends: The numbers of the sequences that end with it.
    """

    tokens: list[int]
    children: list[Node] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)

    def walk(self) -> Iterator[Node]:
        """Yield this node and all below."""
        pending = [self]
        while pending:
            node = pending.pop()
            yield node
            pending += node.children


def prefix_tree(sequences: Sequence[list[int]], *, share: bool = True) -> list[Node]:
    """Return the roots of a forest whose paths spell the sequences, none of which may be empty.

    Sequences share a node only where that saves enough; ``share=False`` gives each its own root.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    if not share:
        return [Node(sequences[i], ends=[i]) for i in order]
    roots: list[Node] = []
    # (where to put the nodes; the sequences, sorted; how many of their tokens are above)
    pending: list[tuple[list[Node], list[int], int]] = [(roots, order, 0)]
    while pending:
        into, some, depth = pending.pop()
        for group in _alike(sequences, some, depth):
            first, last = sequences[group[0]], sequences[group[-1]]
            shared = depth
            while shared < min(len(first), len(last)) and first[shared] == last[shared]:
                shared += 1
            if first == last:
                into.append(Node(first[depth:], ends=group))
            elif (shared - depth) * (len(group) - 1) >= _WORTHWHILE:
                ends = [i for i in group if len(sequences[i]) == shared]
                node = Node(first[depth:shared], ends=ends)
                into.append(node)
                pending.append((node.children, group[len(ends) :], shared))
            else:
                into += [Node(sequences[i][depth:], ends=[i]) for i in group]
    return roots


def _alike(sequences: Sequence[list[int]], some: list[int], depth: int) -> Iterator[list[int]]:
    """Yield runs of those that continue with the same token."""
    start = 0
    for at in range(1, len(some) + 1):
        if at == len(some) or sequences[some[at]][depth] != sequences[some[start]][depth]:
            yield some[start:at]
            start = at
