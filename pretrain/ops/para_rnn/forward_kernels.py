"""ParaGRU and ParaLSTM forward by segment shooting: every pass of a tile in one kernel.

A program owns some channels of one part of the row of tokens (:mod:`pretrain.ops.para_rnn.parts`)
and works through it in tiles of S segments of L tokens. The tile's start is exact before it begins;
the starts of its other segments are guessed to be 0. In a pass every segment is stepped through
from its start, all side by side, and the product R of its Jacobians is carried beside the state.
Where one ends and the next was started there is a gap; the starts' shifts follow
shift_{j+1} = R_j shift_j + gap_j, a scan over the segments. That is Newton's method for the starts
alone (multiple shooting), and converges quadratically. When no start moves by more than the
tolerance the tile is done, and its states have been stored along the way.

A start that would not move is left as it is, bit for bit: a sequence does not feel what others in
its tile still need. A sequence that is not solved after so many passes is handed on instead, each
of its segments starting where the one before it ended: the starts are those of plain stepping after
one pass more for each segment, and it is counted.

Sequences begin and end anywhere. Where one begins, its initial state is loaded and the segment's
map is cut, where it ends the state is stored; both by flags of the token, see `Parts.borders`.

Memory sees u (3 D per token) and the states (D, or 2 D) once; the other passes find them in caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell, lstm_cell
from pretrain.ops.para_rnn.segment_kernels import (
    FIRST,
    FLAG_BITS,
    LAST,
    any_of,
    follow,
    follow_pair,
    from_after,
    from_before,
    largest,
    special_blocks,
    tile_row,
)


@triton.jit
def _inputs(u, token, length, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, D: tl.constexpr):
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
def _gru_block(
    h,
    r_h,
    cut,
    weights,
    u,
    initial,
    states,
    final,
    borders,
    token,
    length,
    channels,
    SPECIAL: tl.constexpr,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Step through AHEAD tokens; what only SPECIAL blocks have to look for costs a third more."""
    a_z, a_r, a_c, b_z, b_r, b_c = weights
    ok = channels < D
    u_z, u_r, u_c = _inputs(u, token, length, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token + i < length)[:, None] & ok
            code = tl.load(borders + i, mask=(token + i < length)[:, None], other=0)
            state = (code >> FLAG_BITS).to(tl.int64) * D + channels
            h = tl.load(initial + state, mask=((code & FIRST) != 0) & ok, other=h)
            cut = cut | (code & FIRST)
        h, jacobian, _r, _1, _2, _3 = gru_cell(
            h,
            u_z[i].to(h.dtype) + b_z,
            u_r[i].to(h.dtype) + b_r,
            u_c[i].to(h.dtype) + b_c,
            a_z,
            a_r,
            a_c,
            APPROXIMATE,
        )
        r_h = r_h * jacobian
        tl.store(states + i * D, h.to(states.dtype.element_ty), mask=here)
        if SPECIAL:
            tl.store(final + state, h, mask=((code & LAST) != 0) & ok)
    return h, r_h, cut


@triton.jit
def _lstm_block(
    cell,
    h,
    ra,
    rb,
    rc,
    rd,
    cut,
    weights,
    u,
    initial,
    states,
    final,
    borders,
    token,
    length,
    channels,
    SPECIAL: tl.constexpr,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Do as :func:`_gru_block`."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    ok = channels < D
    u_f, u_o, u_z = _inputs(u, token, length, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token + i < length)[:, None] & ok
            code = tl.load(borders + i, mask=(token + i < length)[:, None], other=0)
            state = (code >> FLAG_BITS).to(tl.int64) * (2 * D) + channels
            cell = tl.load(initial + state, mask=((code & FIRST) != 0) & ok, other=cell)
            h = tl.load(initial + state + D, mask=((code & FIRST) != 0) & ok, other=h)
            cut = cut | (code & FIRST)
        cell, h, ja, jb, jc, jd, _1, _2, _3, _4 = lstm_cell(
            cell,
            h,
            u_f[i].to(h.dtype) + b_f,
            u_o[i].to(h.dtype) + b_o,
            u_z[i].to(h.dtype) + b_z,
            a_f,
            a_o,
            a_z,
            c_f,
            c_o,
            APPROXIMATE,
        )
        ra, rc = ja * ra + jb * rc, jc * ra + jd * rc
        rb, rd = ja * rb + jb * rd, jc * rb + jd * rd
        tl.store(states + i * 2 * D, cell.to(states.dtype.element_ty), mask=here)
        tl.store(states + (i * 2 + 1) * D, h.to(states.dtype.element_ty), mask=here)
        if SPECIAL:
            tl.store(final + state, cell, mask=((code & LAST) != 0) & ok)
            tl.store(final + state + D, h, mask=((code & LAST) != 0) & ok)
    return cell, h, ra, rb, rc, rd, cut


@triton.jit
def _as_loaded(x, initial, channels):
    """Return x ``[S, C]``, laid out over the threads as tensors are when loaded.

    The mask is never true. Without this the compiler keeps x as the scan has left it, a column to a
    warp, and rearranges it in every turn of the loop that steps.
    """
    address = initial + channels + tl.zeros(x.shape, tl.int32)
    return tl.load(address, mask=(channels < 0) & (x == x), other=x)


@triton.jit
def _mark_failures(failures, ids, begin, moved):
    """Count the sequences whose state at a segment's start still moves."""
    sequence = tl.load(ids + begin - 1, mask=begin > 0, other=0)
    tl.store(failures + sequence[:, None] + tl.zeros(moved.shape, tl.int64), 1, mask=moved)


@triton.jit(do_not_specialize=["iterations", "most_passes"])
def _gru_forward_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    starts,
    borders,
    ids,
    residuals,
    failures,
    passes,
    tolerance,
    iterations,
    most_passes,
    D: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    AHEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    part, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + part)
    length = (tl.load(starts + part + 1) - start).to(tl.int32)
    channels, segment = (block * C + tl.arange(0, C))[None, :], tl.arange(0, S)
    ok = channels < D
    a_z = tl.load(parameters + channels, mask=ok, other=0.0)
    a_r = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_c = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    b_r = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_c = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    weights = a_z, a_r, a_c, b_z, b_r, b_c
    wide: tl.constexpr = parameters.dtype.element_ty
    zeros = tl.zeros([S, C], wide)
    carry, worst, most = tl.zeros([C], wide), tl.sum(tl.zeros([C], wide), 0), 0
    for first in range(0, length, S * L):
        begin = first + segment * L
        followed = ((segment < S - 1) & (begin + L < length))[:, None] & ok
        here = (start + begin).to(tl.int64)[:, None]
        special = special_blocks(
            borders + start, begin[:, None] + tl.arange(0, L)[None, :], length, L, AHEAD
        )
        h_0 = tl.where((segment == 0)[:, None], carry[None, :], zeros)
        h, residual, handed = h_0, worst, followed & False
        done, unsolved = 0, True
        while unsolved:
            of_u, of_states = u + here * (3 * D) + channels, states + here * D + channels
            of_borders = borders + here
            h, r_h, cut = (
                _as_loaded(h_0, initial, channels),
                zeros + 1.0,
                tl.zeros([S, 1], tl.int32),
            )
            for at in range(0, L, AHEAD):
                if (special >> (at // AHEAD)) & 1:
                    h, r_h, cut = _gru_block(
                        h,
                        r_h,
                        cut,
                        weights,
                        of_u,
                        initial,
                        of_states,
                        final,
                        of_borders,
                        begin + at,
                        length,
                        channels,
                        True,
                        AHEAD,
                        D,
                        APPROXIMATE,
                    )
                else:
                    h, r_h, cut = _gru_block(
                        h,
                        r_h,
                        cut,
                        weights,
                        of_u,
                        initial,
                        of_states,
                        final,
                        of_borders,
                        begin + at,
                        length,
                        channels,
                        False,
                        AHEAD,
                        D,
                        APPROXIMATE,
                    )
                of_u, of_states = of_u + AHEAD * 3 * D, of_states + AHEAD * D
                of_borders += AHEAD
            done += 1
            cuts = cut + tl.zeros([S, C], tl.int32)
            if done <= iterations:
                gap = tl.where(followed, h - from_after(h_0, S, C), 0.0)
                _1, _2, shift = tl.associative_scan((cuts, r_h, gap), 0, follow)
                shift = tl.where(followed, shift, 0.0)
                far = ~(tl.abs(shift) <= tolerance)
                residual, moved = largest(tl.abs(shift)), from_before(far.to(tl.int32), 0, S, C) > 0
                unsolved = any_of(moved)
                if done < iterations:
                    h_0 = tl.where(moved, h_0 + from_before(shift, 0.0, S, C), h_0)
                else:
                    if unsolved & (most_passes > iterations):
                        _mark_failures(failures, ids + start, begin, moved)
                    # What follows a start that moves, as far as the sequence goes, is handed on.
                    _1, _2, follows = tl.associative_scan(
                        (cuts, zeros + 1.0, far.to(wide)), 0, follow
                    )
                    handed = from_before(follows, 0.0, S, C) > 0
            if done >= iterations:
                ended = from_before(h, 0.0, S, C)
                unsolved = any_of(handed & (ended != h_0))
                h_0 = tl.where(handed, ended, h_0)
            unsolved = unsolved & (done < most_passes)
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        carry = tile_row(h, segment, S - 1)
    report = part * tl.num_programs(1) + block
    tl.store(residuals + report, worst)
    tl.store(passes + report, most)


@triton.jit(do_not_specialize=["iterations", "most_passes"])
def _lstm_forward_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    starts,
    borders,
    ids,
    residuals,
    failures,
    passes,
    tolerance,
    iterations,
    most_passes,
    D: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    AHEAD: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    part, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(starts + part)
    length = (tl.load(starts + part + 1) - start).to(tl.int32)
    channels, segment = (block * C + tl.arange(0, C))[None, :], tl.arange(0, S)
    ok = channels < D
    a_f = tl.load(parameters + channels, mask=ok, other=0.0)
    a_o = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_z = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    c_f = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    c_o = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_f = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    b_o = tl.load(parameters + 6 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 7 * D + channels, mask=ok, other=0.0)
    weights = a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z
    wide: tl.constexpr = parameters.dtype.element_ty
    zeros = tl.zeros([S, C], wide)
    carry_c, carry_h = tl.zeros([C], wide), tl.zeros([C], wide)
    worst, most = tl.sum(tl.zeros([C], wide), 0), 0
    for first in range(0, length, S * L):
        begin = first + segment * L
        followed = ((segment < S - 1) & (begin + L < length))[:, None] & ok
        here = (start + begin).to(tl.int64)[:, None]
        special = special_blocks(
            borders + start, begin[:, None] + tl.arange(0, L)[None, :], length, L, AHEAD
        )
        c_0 = tl.where((segment == 0)[:, None], carry_c[None, :], zeros)
        h_0 = tl.where((segment == 0)[:, None], carry_h[None, :], zeros)
        cell, h, residual, handed = c_0, h_0, worst, followed & False
        done, unsolved = 0, True
        while unsolved:
            of_u, of_states = u + here * (3 * D) + channels, states + here * (2 * D) + channels
            of_borders = borders + here
            cell, h = _as_loaded(c_0, initial, channels), _as_loaded(h_0, initial, channels)
            ra, rb, rc, rd = zeros + 1.0, zeros, zeros, zeros + 1.0
            cut = tl.zeros([S, 1], tl.int32)
            for at in range(0, L, AHEAD):
                if (special >> (at // AHEAD)) & 1:
                    cell, h, ra, rb, rc, rd, cut = _lstm_block(
                        cell,
                        h,
                        ra,
                        rb,
                        rc,
                        rd,
                        cut,
                        weights,
                        of_u,
                        initial,
                        of_states,
                        final,
                        of_borders,
                        begin + at,
                        length,
                        channels,
                        True,
                        AHEAD,
                        D,
                        APPROXIMATE,
                    )
                else:
                    cell, h, ra, rb, rc, rd, cut = _lstm_block(
                        cell,
                        h,
                        ra,
                        rb,
                        rc,
                        rd,
                        cut,
                        weights,
                        of_u,
                        initial,
                        of_states,
                        final,
                        of_borders,
                        begin + at,
                        length,
                        channels,
                        False,
                        AHEAD,
                        D,
                        APPROXIMATE,
                    )
                of_u, of_states = of_u + AHEAD * 3 * D, of_states + AHEAD * 2 * D
                of_borders += AHEAD
            done += 1
            cuts = cut + tl.zeros([S, C], tl.int32)
            if done <= iterations:
                gap_c = tl.where(followed, cell - from_after(c_0, S, C), 0.0)
                gap_h = tl.where(followed, h - from_after(h_0, S, C), 0.0)
                _1, _2, _3, _4, _5, shift_c, shift_h = tl.associative_scan(
                    (cuts, ra, rb, rc, rd, gap_c, gap_h), 0, follow_pair
                )
                shift_c = tl.where(followed, shift_c, 0.0)
                shift_h = tl.where(followed, shift_h, 0.0)
                far = ~((tl.abs(shift_c) <= tolerance) & (tl.abs(shift_h) <= tolerance))
                residual = tl.maximum(largest(tl.abs(shift_c)), largest(tl.abs(shift_h)))
                moved = from_before(far.to(tl.int32), 0, S, C) > 0
                unsolved = any_of(moved)
                if done < iterations:
                    c_0 = tl.where(moved, c_0 + from_before(shift_c, 0.0, S, C), c_0)
                    h_0 = tl.where(moved, h_0 + from_before(shift_h, 0.0, S, C), h_0)
                else:
                    if unsolved & (most_passes > iterations):
                        _mark_failures(failures, ids + start, begin, moved)
                    _1, _2, follows = tl.associative_scan(
                        (cuts, zeros + 1.0, far.to(wide)), 0, follow
                    )
                    handed = from_before(follows, 0.0, S, C) > 0
            if done >= iterations:
                ended_c, ended_h = from_before(cell, 0.0, S, C), from_before(h, 0.0, S, C)
                unsolved = any_of(handed & ((ended_c != c_0) | (ended_h != h_0)))
                c_0, h_0 = tl.where(handed, ended_c, c_0), tl.where(handed, ended_h, h_0)
            unsolved = unsolved & (done < most_passes)
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        carry_c, carry_h = tile_row(cell, segment, S - 1), tile_row(h, segment, S - 1)
    report = part * tl.num_programs(1) + block
    tl.store(residuals + report, worst)
    tl.store(passes + report, most)


KERNELS = {"para_gru": _gru_forward_kernel, "para_lstm": _lstm_forward_kernel}
