"""ParaLSTM backward by segments (:mod:`pretrain.ops.para_rnn.segment_kernels`)."""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import lstm_cell
from pretrain.ops.para_rnn.segment_kernels import (
    LAST,
    code_before,
    follow_pair,
    from_before,
    inputs_back_from,
    special_blocks,
    states_before,
    tile_row,
)


@triton.jit
def _lstm_map_block(
    x_c,
    x_h,
    ra,
    rb,
    rc,
    rd,
    cut,
    weights,
    u,
    initial,
    states,
    d_output,
    d_final,
    borders,
    token,
    channels,
    SPECIAL: tl.constexpr,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
):
    """Step AHEAD tokens back with the maps R, s (here x) of what enters, by J transposed."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    ok = channels < D
    u_f, u_o, u_z, g = inputs_back_from(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before_c = states_before(states, token, ok, SPECIAL, AHEAD, 2 * D)
    before_h = states_before(states + D, token, ok, SPECIAL, AHEAD, 2 * D)
    for i in tl.static_range(AHEAD):
        cell, h = before_c[i].to(x_c.dtype), before_h[i].to(x_c.dtype)
        if SPECIAL:
            code, sequence, begins, ends = code_before(borders, token, i)
            state = sequence * (2 * D) + channels
            cell = tl.load(initial + state, mask=begins & ok, other=cell)
            h = tl.load(initial + state + D, mask=begins & ok, other=h)
            x_c = tl.load(d_final + state, mask=ends & ok, other=x_c)
            x_h = tl.load(d_final + state + D, mask=ends & ok, other=x_h)
            cut = cut | (code & LAST)
        _n, _h, ja, jb, jc, jd, _1, _2, _3, _4 = lstm_cell(
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
            False,
        )
        l_c, l_h = x_c, x_h + g[i].to(h.dtype)
        x_c, x_h = ja * l_c + jc * l_h, jb * l_c + jd * l_h
        ra, rc = ja * ra + jc * rc, jb * ra + jd * rc
        rb, rd = ja * rb + jc * rd, jb * rb + jd * rd
    return x_c, x_h, ra, rb, rc, rd, cut


@triton.jit
def _lstm_gradient_block(
    x_c,
    x_h,
    sums,
    weights,
    u,
    initial,
    states,
    d_output,
    d_final,
    d_u,
    d_initial,
    borders,
    token,
    channels,
    SPECIAL: tl.constexpr,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
):
    """Step AHEAD tokens back with the gradients x themselves, and write what they give."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    da_f, da_o, da_z, dc_f, dc_o, db_f, db_o, db_z = sums
    ok = channels < D
    u_f, u_o, u_z, g = inputs_back_from(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before_c = states_before(states, token, ok, SPECIAL, AHEAD, 2 * D)
    before_h = states_before(states + D, token, ok, SPECIAL, AHEAD, 2 * D)
    for i in tl.static_range(AHEAD):
        cell, h = before_c[i].to(x_c.dtype), before_h[i].to(x_c.dtype)
        here = ok
        if SPECIAL:
            _code, sequence, begins, ends = code_before(borders, token, i)
            state = sequence * (2 * D) + channels
            cell = tl.load(initial + state, mask=begins & ok, other=cell)
            h = tl.load(initial + state + D, mask=begins & ok, other=h)
            x_c = tl.load(d_final + state, mask=ends & ok, other=x_c)
            x_h = tl.load(d_final + state + D, mask=ends & ok, other=x_h)
            here = (token - i >= 0)[:, None] & ok
        new, _h, ja, jb, jc, jd, to_f, to_z, to_o, by_cell = lstm_cell(
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
            False,
        )
        l_c, l_h = x_c, x_h + g[i].to(h.dtype)
        d_new = l_c + l_h * by_cell
        d_f, d_o, d_z = d_new * to_f, l_h * to_o, d_new * to_z
        tl.store(d_u - i * 3 * D, d_f.to(d_u.dtype.element_ty), mask=here)
        tl.store(d_u - (i * 3 - 1) * D, d_o.to(d_u.dtype.element_ty), mask=here)
        tl.store(d_u - (i * 3 - 2) * D, d_z.to(d_u.dtype.element_ty), mask=here)
        da_f, da_o, da_z = da_f + d_f * h, da_o + d_o * h, da_z + d_z * h
        dc_f, dc_o = dc_f + d_f * cell, dc_o + d_o * new
        db_f, db_o, db_z = db_f + d_f, db_o + d_o, db_z + d_z
        x_c, x_h = ja * l_c + jc * l_h, jb * l_c + jd * l_h
        if SPECIAL:
            tl.store(d_initial + state, x_c, mask=begins & ok)
            tl.store(d_initial + state + D, x_h, mask=begins & ok)
            x_c, x_h = tl.where(begins, 0.0, x_c), tl.where(begins, 0.0, x_h)
    return x_c, x_h, (da_f, da_o, da_z, dc_f, dc_o, db_f, db_o, db_z)


@triton.jit
def lstm_backward_kernel(
    u,
    parameters,
    initial,
    states,
    d_output,
    d_final,
    d_u,
    d_parameters,
    d_initial,
    starts,
    borders,
    D: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Run ParaLSTM backward over one part, for C of its channels."""
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
    zeros = tl.zeros([S, C], wide)
    weights = a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z
    sums = zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros
    carry_c, carry_h = tl.zeros([C], wide), tl.zeros([C], wide)
    for back in range(0, length, S * L):
        last = length - back - 1 - segment * L  # of each segment, whence it is walked back
        row = (start + last).to(tl.int64)[:, None]
        special = special_blocks(
            borders + start, last[:, None] - tl.arange(0, L)[None, :], length, L, AHEAD
        )
        ra, rb, rc, rd = zeros + 1.0, zeros, zeros, zeros + 1.0
        x_c, x_h, cut = zeros, zeros, tl.zeros([S, 1], tl.int32)
        of_u, of_h, of_g = u + row * (3 * D) + channels, states + row * (2 * D), d_output + row * D
        of_h, of_g, of_borders = of_h + channels, of_g + channels, borders + row
        for at in range(0, L, AHEAD):
            if (special >> (at // AHEAD)) & 1:
                x_c, x_h, ra, rb, rc, rd, cut = _lstm_map_block(
                    x_c,
                    x_h,
                    ra,
                    rb,
                    rc,
                    rd,
                    cut,
                    weights,
                    of_u,
                    initial,
                    of_h,
                    of_g,
                    d_final,
                    of_borders,
                    last - at,
                    channels,
                    True,
                    AHEAD,
                    D,
                )
            else:
                x_c, x_h, ra, rb, rc, rd, cut = _lstm_map_block(
                    x_c,
                    x_h,
                    ra,
                    rb,
                    rc,
                    rd,
                    cut,
                    weights,
                    of_u,
                    initial,
                    of_h,
                    of_g,
                    d_final,
                    of_borders,
                    last - at,
                    channels,
                    False,
                    AHEAD,
                    D,
                )
            of_u, of_h, of_g = of_u - AHEAD * 3 * D, of_h - AHEAD * 2 * D, of_g - AHEAD * D
            of_borders -= AHEAD
        cuts = cut + tl.zeros([S, C], tl.int32)
        cuts, ra, rb, rc, rd, x_c, x_h = tl.associative_scan(
            (cuts, ra, rb, rc, rd, x_c, x_h), 0, follow_pair
        )
        c_in, h_in = carry_c[None, :], carry_h[None, :]
        left_c = tl.where(cuts != 0, x_c, ra * c_in + rb * h_in + x_c)
        left_h = tl.where(cuts != 0, x_h, rc * c_in + rd * h_in + x_h)
        inner = (last >= 0)[:, None]  # nothing comes from before the part
        x_c = tl.where(inner, from_before(left_c, c_in, S, C), 0.0)
        x_h = tl.where(inner, from_before(left_h, h_in, S, C), 0.0)
        of_u, of_h, of_g = u + row * (3 * D) + channels, states + row * (2 * D), d_output + row * D
        of_h, of_g, of_borders = of_h + channels, of_g + channels, borders + row
        of_d = d_u + row * (3 * D) + channels
        for at in range(0, L, AHEAD):
            if (special >> (at // AHEAD)) & 1:
                x_c, x_h, sums = _lstm_gradient_block(
                    x_c,
                    x_h,
                    sums,
                    weights,
                    of_u,
                    initial,
                    of_h,
                    of_g,
                    d_final,
                    of_d,
                    d_initial,
                    of_borders,
                    last - at,
                    channels,
                    True,
                    AHEAD,
                    D,
                )
            else:
                x_c, x_h, sums = _lstm_gradient_block(
                    x_c,
                    x_h,
                    sums,
                    weights,
                    of_u,
                    initial,
                    of_h,
                    of_g,
                    d_final,
                    of_d,
                    d_initial,
                    of_borders,
                    last - at,
                    channels,
                    False,
                    AHEAD,
                    D,
                )
            of_u, of_h, of_g = of_u - AHEAD * 3 * D, of_h - AHEAD * 2 * D, of_g - AHEAD * D
            of_d, of_borders = of_d - AHEAD * 3 * D, of_borders - AHEAD
        carry_c, carry_h = tile_row(x_c, segment, S - 1), tile_row(x_h, segment, S - 1)
    columns = block * C + tl.arange(0, C)
    of_p, there = d_parameters + part * (8 * D) + columns, columns < D
    for i in tl.static_range(8):
        tl.store(of_p + i * D, tl.sum(sums[i], 0), mask=there)
