"""Kernels by the instructions that they compile to, against the traffic of their memory.

``python -m benchmarks.kernels_compiled`` prints this. What a token costs is read from the machine
code: the shortest way once around each innermost loop, which is the one of blocks of tokens where
no sequence begins or ends.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.ops.para_rnn.kernels import PASSES
from pretrain.ops.shared.launching import SCHEDULERS

CLOCK, COPY = 1.755e9, 4.3e12  # of an H200: cycles, bytes a second
TOKENS, CHANNELS = 8 * 4096, 1024  # the 410M models' ParaRNN, a micro-batch
# Numbers of two bytes that a token and channel move: u, states, and backward two gradients besides.
MOVED = {
    ("para_gru", "forward"): 4,
    ("para_lstm", "forward"): 5,
    ("para_gru", "backward"): 8,
    ("para_lstm", "backward"): 9,
}


class Loops:
    """The loops in a kernel's machine code, as cuobjdump lists it."""

    def __init__(self, code: str):
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
        place = {int(address, 16): i for i, (address, _) in enumerate(lines)}
        self._jumps: dict[int, tuple[int, bool]] = {}  # to where, and whether always
        for i, (_, text) in enumerate(lines):
            found = re.match(r"(@!?U?P\w+\s+)?BRA\S*\s+(?:.*?)(0x[0-9a-f]+)", text)
            if found and int(found[2], 16) in place:
                always = found[1] is None and not re.search(r"BRA\S*\s+!?U?P\d", text)
                self._jumps[i] = place[int(found[2], 16)], always
        loops = [(to, i) for i, (to, _) in self._jumps.items() if to < i]

        def within(a: tuple[int, int], b: tuple[int, int]) -> bool:
            return a != b and b[0] <= a[0] and a[1] <= b[1]

        self.inner = [a for a in loops if not any(within(b, a) for b in loops)]
        self.around = [a for a in loops if any(within(b, a) for b in self.inner)]

    def shortest(self, first: int, last: int) -> int:
        """Return the fewest instructions from ``first`` to ``last``, forward."""
        never = last - first + 2
        best = {first: 1}
        for i in range(first, last):
            here = best.get(i, never)
            to, always = self._jumps.get(i, (i + 1, False))
            if i < to <= last:
                best[to] = min(best.get(to, never), here + 1)
            if not always:
                best[i + 1] = min(best.get(i + 1, never), here + 1)
        return best[last]

    def lengths(self) -> list[int]:
        """Return the shortest way around each innermost loop of more than 20 instructions."""
        return [self.shortest(*loop) for loop in self.inner if loop[1] - loop[0] > 20]


def of_para_rnn(code: str, ahead: int, segment: int) -> float:
    """Return a thread's instructions for a token.

    The innermost loops work off ``ahead`` tokens in a turn; what is around them is done once for
    ``segment`` tokens.
    """
    loops = Loops(code)
    steps = sum(loops.lengths()) / ahead
    if not loops.around:
        return steps
    first, last = min(loops.around, key=lambda a: a[1] - a[0])
    within = sum(b - a + 1 for a, b in loops.inner if first <= a and b <= last)
    return steps + (last - first + 1 - within) / segment


def of_steps(name: str, which: str, code: str, options: dict[str, Any]) -> str:
    """Return a line of the table for M2RNN or a classical cell: a warp's instructions a token.

    M2RNN's backward pass has a loop that computes states again, and one over pieces of tokens.
    """
    lengths = Loops(code).lengths()
    pieces = [*[1] * (len(lengths) - 1), options.get("PIECE", 1)]
    found = sum(length / piece for length, piece in zip(lengths, pieces, strict=True))
    block = "x".join(
        str(options[x]) for x in ("BLOCK_K", "BLOCK_D", "BLOCK_V", "BLOCK_B") if x in options
    )
    return f"{name:<20} {which:<9} {options['num_warps']:>5} {block:>9} {found:>12.0f}"


def row(name: str, which: str, code: str, options: dict[str, Any]) -> str:
    """Return a line of the table for one of ParaRNN's kernels."""
    op, kind = name.split()[:2]
    steps = which == "forward" and kind == "steps"
    passes = PASSES if which == "forward" and not steps else 1
    lanes = of_para_rnn(code, options["AHEAD"], options.get("L", 1)) * passes
    issue = lanes / 32 * TOKENS * CHANNELS / (SCHEDULERS * CLOCK) * 1e3
    floor = 2 * MOVED[op, which] * TOKENS * CHANNELS / COPY * 1e3
    return (
        f"{name:<20} {which:<9} {passes:>6} {lanes:>12.0f} {issue:>9.3f} {floor:>9.3f} "
        f"{issue / floor:>6.1f}"
    )


STEPS_HEADER = f"{'a token of a program':<30} {'warps':>5} {'block':>9} {'instructions':>12}"
HEADER = (
    f"{'ParaRNN, 8 x 4096 x 1024':<30} {'passes':>6} {'instructions':>12} {'issue, ms':>9} "
    f"{'floor, ms':>9} {'ratio':>6}"
)
