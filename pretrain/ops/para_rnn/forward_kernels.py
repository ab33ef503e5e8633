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
    tile_row,
)


@triton.jit
def _inputs(u, borders, token, length, ok, AHEAD: tl.constexpr, D: tl.constexpr):
    """Load the inputs and the border codes of AHEAD tokens from ``token`` on."""
    a, b, c, codes = (), (), (), ()
    for i in tl.static_range(AHEAD):
        inside = (token + i < length)[:, None]
        a = a + (tl.load(u + i * 3 * D, mask=inside & ok),)
        b = b + (tl.load(u + (i * 3 + 1) * D, mask=inside & ok),)
        c = c + (tl.load(u + (i * 3 + 2) * D, mask=inside & ok),)
        codes = codes + (tl.load(borders + i, mask=inside, other=0),)
    return a, b, c, codes


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
    wide: tl.constexpr = parameters.dtype.element_ty
    narrow: tl.constexpr = states.dtype.element_ty
    zeros = tl.zeros([S, C], wide)
    carry, worst, most = tl.zeros([C], wide), tl.sum(tl.zeros([C], wide), 0), 0
    for first in range(0, length, S * L):
        begin = first + segment * L
        followed = ((segment < S - 1) & (begin + L < length))[:, None] & ok
        here = (start + begin).to(tl.int64)[:, None]
        h_0 = tl.where((segment == 0)[:, None], carry[None, :], zeros)
        h, residual, handed = h_0, worst, followed & False
        done, unsolved = 0, True
        while unsolved:
            h, r_h, cut = h_0, zeros + 1.0, tl.zeros([S, 1], tl.int32)
            of_u, of_states = u + here * (3 * D) + channels, states + here * D + channels
            of_borders = borders + here
            for at in range(0, L, AHEAD):
                token = begin + at
                u_z, u_r, u_c, codes = _inputs(of_u, of_borders, token, length, ok, AHEAD, D)
                for i in tl.static_range(AHEAD):
                    begins, ends = (codes[i] & FIRST) != 0, (codes[i] & LAST) != 0
                    state = (codes[i] >> FLAG_BITS).to(tl.int64) * D + channels
                    h = tl.load(initial + state, mask=begins & ok, other=h)
                    h, jacobian, _r, _1, _2, _3 = gru_cell(
                        h,
                        u_z[i].to(wide) + b_z,
                        u_r[i].to(wide) + b_r,
                        u_c[i].to(wide) + b_c,
                        a_z,
                        a_r,
                        a_c,
                        APPROXIMATE,
                    )
                    r_h, cut = r_h * jacobian, cut | (codes[i] & FIRST)
                    inside = (token + i < length)[:, None] & ok
                    tl.store(of_states + i * D, h.to(narrow), mask=inside)
                    tl.store(final + state, h, mask=ends & ok)
                of_u, of_states, of_borders = (
                    of_u + AHEAD * 3 * D,
                    of_states + AHEAD * D,
                    of_borders + AHEAD,
                )
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
    wide: tl.constexpr = parameters.dtype.element_ty
    narrow: tl.constexpr = states.dtype.element_ty
    zeros = tl.zeros([S, C], wide)
    carry_c, carry_h = tl.zeros([C], wide), tl.zeros([C], wide)
    worst, most = tl.sum(tl.zeros([C], wide), 0), 0
    for first in range(0, length, S * L):
        begin = first + segment * L
        followed = ((segment < S - 1) & (begin + L < length))[:, None] & ok
        here = (start + begin).to(tl.int64)[:, None]
        c_0 = tl.where((segment == 0)[:, None], carry_c[None, :], zeros)
        h_0 = tl.where((segment == 0)[:, None], carry_h[None, :], zeros)
        cell, h, residual, handed = c_0, h_0, worst, followed & False
        done, unsolved = 0, True
        while unsolved:
            cell, h, cut = c_0, h_0, tl.zeros([S, 1], tl.int32)
            ra, rb, rc, rd = zeros + 1.0, zeros, zeros, zeros + 1.0
            of_u, of_states = u + here * (3 * D) + channels, states + here * (2 * D) + channels
            of_borders = borders + here
            for at in range(0, L, AHEAD):
                token = begin + at
                u_f, u_o, u_z, codes = _inputs(of_u, of_borders, token, length, ok, AHEAD, D)
                for i in tl.static_range(AHEAD):
                    begins, ends = (codes[i] & FIRST) != 0, (codes[i] & LAST) != 0
                    state = (codes[i] >> FLAG_BITS).to(tl.int64) * (2 * D) + channels
                    cell = tl.load(initial + state, mask=begins & ok, other=cell)
                    h = tl.load(initial + state + D, mask=begins & ok, other=h)
                    cell, h, ja, jb, jc, jd, _1, _2, _3, _4 = lstm_cell(
                        cell,
                        h,
                        u_f[i].to(wide) + b_f,
                        u_o[i].to(wide) + b_o,
                        u_z[i].to(wide) + b_z,
                        a_f,
                        a_o,
                        a_z,
                        c_f,
                        c_o,
                        APPROXIMATE,
                    )
                    ra, rc = ja * ra + jb * rc, jc * ra + jd * rc
                    rb, rd = ja * rb + jb * rd, jc * rb + jd * rd
                    cut = cut | (codes[i] & FIRST)
                    inside = (token + i < length)[:, None] & ok
                    tl.store(of_states + i * 2 * D, cell.to(narrow), mask=inside)
                    tl.store(of_states + (i * 2 + 1) * D, h.to(narrow), mask=inside)
                    tl.store(final + state, cell, mask=ends & ok)
                    tl.store(final + state + D, h, mask=ends & ok)
                of_u, of_states, of_borders = (
                    of_u + AHEAD * 3 * D,
                    of_states + AHEAD * 2 * D,
                    of_borders + AHEAD,
                )
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
