"""ParaGRU and ParaLSTM by segment shooting: the method, and what the kernels of both cells share.

A program owns some channels of one part of the row of tokens (:mod:`pretrain.ops.para_rnn.parts`)
and works through it in tiles of S segments of L tokens, a thread to a segment and channel.

Forward, a tile's start is exact before it begins; the starts of its other segments are guessed to
be 0. In a pass every segment is stepped through from its start, all side by side, and the product R
of its Jacobians is carried beside the state. Where one ends and the next was started there is a
gap; the starts' shifts follow shift_{j+1} = R_j shift_j + gap_j, a scan over the segments. That is
Newton's method for the starts alone (multiple shooting) and converges quadratically. When no start
would move by more than the tolerance the tile is done; its states were stored along the way.

A start that would not move is left as it is, bit for bit: a sequence does not feel what others in
its tile still need. A sequence that is not solved after so many passes is handed on instead, each
of its segments starting where the one before it ended. After as many passes more as there are
segments its starts are those of plain stepping; it is counted.

Backward is linear, lambda_l = g_l + J_{l+1}^T lambda_{l+1}, so that two passes do: the first finds
each segment's map, a scan what enters each, the second steps through all with that and writes the
gradients. Segments are numbered from the end, so that the scan runs forward: in reverse Triton's is
wrong for maps that do not commute, several warps taking part (triton issues 4362 and 8412).

Sequences begin and end anywhere. Where one begins, its initial state is loaded and the segment's
map is cut: what leaves it does not depend on what enters, be that not a number. Where one ends, its
state is stored. Both are told by flags of the token (`Parts.borders`), which only those blocks of
tokens look for in which there are some.

Memory sees u (3 D per token) and the states (D, or 2 D) once forward; backward u, states, the
gradient of the output, and the gradient of u. All passes but the first read from caches.

Tensors ``[S, C]`` hold a number for each segment and channel.
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


@triton.jit
def inputs_from(u, token, length, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, D: tl.constexpr):
    """Load the inputs of AHEAD tokens from ``token`` on."""
    a, b, c = (), (), ()
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token + i < length)[:, None] & ok
        a = a + (tl.load(u + i * 3 * D, mask=here),)
        b = b + (tl.load(u + (i * 3 + 1) * D, mask=here),)
        c = c + (tl.load(u + (i * 3 + 2) * D, mask=here),)
    return a, b, c


@triton.jit
def as_loaded(x, initial, channels):
    """Return x ``[S, C]``, laid out over the threads as tensors are when loaded.

    The mask is never true. Without this the compiler keeps x as the scan has left it, a column to a
    warp, and rearranges it in every turn of the loop that steps.
    """
    address = initial + channels + tl.zeros(x.shape, tl.int32)
    return tl.load(address, mask=(channels < 0) & (x == x), other=x)


@triton.jit
def mark_failures(failures, ids, begin, moved):
    """Count the sequences whose state at a segment's start still moves."""
    sequence = tl.load(ids + begin - 1, mask=begin > 0, other=0)
    tl.store(failures + sequence[:, None] + tl.zeros(moved.shape, tl.int64), 1, mask=moved)


@triton.jit
def inputs_back_from(
    u, d_output, token, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, D: tl.constexpr
):
    """Load the inputs and output gradients of AHEAD tokens, ``token`` and those before."""
    a, b, c, g = (), (), (), ()
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token - i >= 0)[:, None] & ok
        a = a + (tl.load(u - i * 3 * D, mask=here, other=0.0),)
        b = b + (tl.load(u - (i * 3 - 1) * D, mask=here, other=0.0),)
        c = c + (tl.load(u - (i * 3 - 2) * D, mask=here, other=0.0),)
        g = g + (tl.load(d_output - i * D, mask=here, other=0.0),)
    return a, b, c, g


@triton.jit
def states_before(
    states, token, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, WIDTH: tl.constexpr
):
    """Load the states before AHEAD tokens, 0 at the part's first, whose state is given."""
    h = ()
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token - i > 0)[:, None] & ok
        h = h + (tl.load(states - (i + 1) * WIDTH, mask=here, other=0.0),)
    return h


@triton.jit
def code_before(borders, token, i: tl.constexpr):
    """Load a token's border code; return it, its sequence's number, and whether it is an end."""
    code = tl.load(borders - i, mask=(token - i >= 0)[:, None], other=0)
    return code, (code >> FLAG_BITS).to(tl.int64), (code & FIRST) != 0, (code & LAST) != 0
