"""ParaLSTM forward by segment shooting (:mod:`pretrain.ops.para_rnn.segment_kernels`)."""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import lstm_cell
from pretrain.ops.para_rnn.segment_kernels import (
    FIRST,
    FLAG_BITS,
    LAST,
    any_of,
    as_loaded,
    follow,
    follow_pair,
    from_after,
    from_before,
    inputs_from,
    largest,
    mark_failures,
    special_blocks,
    tile_row,
)


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
    """Step through AHEAD tokens; SPECIAL blocks look for borders, which costs a third more."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    ok = channels < D
    u_f, u_o, u_z = inputs_from(u, token, length, ok, SPECIAL, AHEAD, D)
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


@triton.jit(do_not_specialize=["iterations", "most_passes"])
def lstm_forward_kernel(
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
    """Run ParaLSTM forward over one part, for C of its channels."""
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
            cell, h = as_loaded(c_0, initial, channels), as_loaded(h_0, initial, channels)
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
                unsolved = residual > tolerance
                if done < iterations:
                    c_0 = tl.where(moved, c_0 + from_before(shift_c, 0.0, S, C), c_0)
                    h_0 = tl.where(moved, h_0 + from_before(shift_h, 0.0, S, C), h_0)
                else:
                    if unsolved & (most_passes > iterations):
                        mark_failures(failures, ids + start, begin, moved)
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
