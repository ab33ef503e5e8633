"""ParaGRU forward by segment shooting (:mod:`pretrain.ops.para_rnn.segment_kernels`)."""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell
from pretrain.ops.para_rnn.segment_kernels import (
    FIRST,
    FLAG_BITS,
    LAST,
    any_of,
    as_loaded,
    follow,
    from_after,
    from_before,
    inputs_from,
    largest,
    mark_failures,
    special_blocks,
    tile_row,
)


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
    """Step through AHEAD tokens; SPECIAL blocks look for borders, which costs a third more."""
    a_z, a_r, a_c, b_z, b_r, b_c = weights
    ok = channels < D
    u_z, u_r, u_c = inputs_from(u, token, length, ok, SPECIAL, AHEAD, D)
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


@triton.jit(do_not_specialize=["iterations", "most_passes"])
def gru_forward_kernel(
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
    """Run ParaGRU forward over one part, for C of its channels."""
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
                as_loaded(h_0, initial, channels),
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
                unsolved = residual > tolerance
                if done < iterations:
                    h_0 = tl.where(moved, h_0 + from_before(shift, 0.0, S, C), h_0)
                else:
                    if unsolved & (most_passes > iterations):
                        mark_failures(failures, ids + start, begin, moved)
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
