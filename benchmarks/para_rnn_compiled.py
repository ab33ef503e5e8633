"""ParaRNN's kernels by the instructions that they compile to, against the traffic of their memory.

``python -m benchmarks.kernels_compiled`` prints this. What a token and channel cost is read from
the machine code: the shortest way once around each innermost loop, which is the one of blocks of
tokens where no sequence begins or ends, and a share of what surrounds it once for a segment.
"""

from __future__ import annotations

import re
from typing import Any

from pretrain.ops.para_rnn.kernels import PASSES

SCHEDULERS, CLOCK, COPY = 528, 1.755e9, 4.3e12  # of an H200: instructions of warps, bytes a second
TOKENS, CHANNELS = 8 * 4096, 1024  # the 410M models' ParaRNN, a micro-batch
# Numbers of two bytes that a token and channel move: u, states, and backward two gradients besides.
MOVED = {
    ("para_gru", "forward"): 4,
    ("para_lstm", "forward"): 5,
    ("para_gru", "backward"): 8,
    ("para_lstm", "backward"): 9,
}


def per_token(code: str, ahead: int, segment: int) -> float:
    """Return a thread's instructions for a token in ``code``, cuobjdump's listing of a kernel.

    The innermost loops work off ``ahead`` tokens in a turn; what is around them is done once for
    ``segment`` tokens.
    """
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.MULTILINE)
    addresses = [int(address, 16) for address, _ in lines]
    place = {address: i for i, address in enumerate(addresses)}
    jumps: dict[int, tuple[int, bool]] = {}  # to where, and whether always
    for i, (_, text) in enumerate(lines):
        found = re.match(r"(@!?U?P\w+\s+)?BRA\S*\s+(?:.*?)(0x[0-9a-f]+)", text)
        if found and int(found[2], 16) in place:
            always = found[1] is None and not re.search(r"BRA\S*\s+!?U?P\d", text)
            jumps[i] = place[int(found[2], 16)], always
    loops = [(to, i) for i, (to, _) in jumps.items() if to < i]
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    around = [
        a for a in loops if a not in inner and any(a[0] <= b[0] and b[1] <= a[1] for b in inner)
    ]
    steps = sum(_shortest(jumps, *loop) for loop in inner if loop[1] - loop[0] > 20) / ahead
    if not around:
        return steps
    first, last = min(around, key=lambda a: a[1] - a[0])
    within = sum(b - a + 1 for a, b in inner if first <= a and b <= last)
    return steps + (last - first + 1 - within) / segment


def _shortest(jumps: dict[int, tuple[int, bool]], first: int, last: int) -> int:
    """Return the fewest instructions from ``first`` to ``last``, forward."""
    never = last - first + 2
    best = {first: 1}
    for i in range(first, last):
        here = best.get(i, never)
        to, always = jumps.get(i, (i + 1, False))
        if i < to <= last:
            best[to] = min(best.get(to, never), here + 1)
        if not always:
            best[i + 1] = min(best.get(i + 1, never), here + 1)
    return best[last]


def row(name: str, which: str, code: str, options: dict[str, Any]) -> str:
    """Return a line of the table for one of ParaRNN's kernels."""
    op, kind = name.split()[:2]
    steps = which == "forward" and kind == "steps"
    length = options.get("L", 1)
    passes = PASSES if which == "forward" and not steps else 1
    lanes = per_token(code, options["AHEAD"], length) * passes
    issue = lanes / 32 * TOKENS * CHANNELS / (SCHEDULERS * CLOCK) * 1e3
    floor = 2 * MOVED[op, which] * TOKENS * CHANNELS / COPY * 1e3
    return (
        f"{name:<20} {which:<9} {passes:>6} {lanes:>12.0f} {issue:>9.3f} {floor:>9.3f} "
        f"{issue / floor:>6.1f}"
    )


HEADER = (
    f"{'ParaRNN, 8 x 4096 x 1024':<30} {'passes':>6} {'instructions':>12} {'issue, ms':>9} "
    f"{'floor, ms':>9} {'ratio':>6}"
)
