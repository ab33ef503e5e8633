"""What the shooting kernels of both directions share: segments of a tile, and maps over them.

Tensors ``[S, C]`` hold a number for each segment and channel. A segment's map carries a state (or a
pair of them) from what enters it to what leaves it, x -> R x + s, unless a sequence begins within:
then it is *cut*, and what leaves does not depend on what enters, be that not a number.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIRST = tl.constexpr(1)  # flag of a sequence's first token in Parts.borders
LAST = tl.constexpr(2)  # flag of its last
FLAG_BITS = tl.constexpr(2)  # both flags; the number of the sequence is above them


@triton.jit
def special_blocks(borders, token, length, L: tl.constexpr, AHEAD: tl.constexpr):
    """Return a bit for each block of AHEAD tokens of the segments, all at once.

    It is set where a sequence begins or ends in one of them or a token lies outside the part.
    ``token`` ``[S, L]`` numbers the part's tokens in the order of steps.
    """
    inside = (token >= 0) & (token < length)
    codes = tl.load(borders + token, mask=inside, other=1)
    special = tl.reshape(tl.max((codes != 0).to(tl.int32), 0), [L // AHEAD, AHEAD])
    return tl.sum(tl.max(special, 1) << tl.arange(0, L // AHEAD), 0)


@triton.jit
def follow(cut1, r1, s1, cut2, r2, s2):
    """Compose the maps of two stretches of segments, the first one first."""
    return cut1 | cut2, r2 * r1, tl.where(cut2 != 0, s2, r2 * s1 + s2)


@triton.jit
def follow_pair(cut1, ra1, rb1, rc1, rd1, s1, t1, cut2, ra2, rb2, rc2, rd2, s2, t2):
    """Compose them for pairs of states: matrices (a b; c d), vectors (s, t)."""
    return (
        cut1 | cut2,
        ra2 * ra1 + rb2 * rc1,
        ra2 * rb1 + rb2 * rd1,
        rc2 * ra1 + rd2 * rc1,
        rc2 * rb1 + rd2 * rd1,
        tl.where(cut2 != 0, s2, ra2 * s1 + rb2 * t1 + s2),
        tl.where(cut2 != 0, t2, rc2 * s1 + rd2 * t1 + t2),
    )


@triton.jit
def from_before(x, at_first, S: tl.constexpr, C: tl.constexpr):
    """Return the rows of x one segment later; the first becomes ``at_first`` (a number or [C])."""
    rows = tl.arange(0, S)[:, None]
    index = tl.maximum(rows - 1, 0) + tl.zeros([S, C], tl.int32)
    return tl.where(rows == 0, at_first, tl.gather(x, index, 0))


@triton.jit
def from_after(x, S: tl.constexpr, C: tl.constexpr):
    """Return the rows of x one segment earlier; the last row stays."""
    index = tl.minimum(tl.arange(0, S)[:, None] + 1, S - 1) + tl.zeros([S, C], tl.int32)
    return tl.gather(x, index, 0)


@triton.jit
def tile_row(x, rows, index):
    """Return one row of a tile."""
    return tl.sum(tl.where((rows == index)[:, None], x, 0.0), 0)


@triton.jit
def largest(x):
    """Return the largest number of a tile, infinity where one is not a number."""
    return tl.max(tl.max(tl.where(x == x, x, float("inf")), 1), 0)


@triton.jit
def any_of(mask):
    """Return whether a tile has a true element."""
    return tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0
