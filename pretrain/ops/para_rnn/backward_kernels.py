"""ParaGRU and ParaLSTM backward: the reverse recurrence of gradients by segments, in one kernel.

It is linear, lambda_l = g_l + J_{l+1}^T lambda_{l+1}, so that two passes over a tile do what takes
shooting several forward (:mod:`pretrain.ops.para_rnn.forward_kernels`, where parts, segments and
the flags of tokens are explained): the first finds each segment's map, a scan over the segments
what enters each, the second steps through all of them with that and writes the gradients. Segments
are numbered from the end, so that the scan runs forward: Triton's scan in reverse is wrong for maps
that do not commute where several warps take part (triton issues 4362 and 8412).

Memory sees u, the states, the gradient of the output and the gradient of u once; the second pass
finds its inputs in caches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell, lstm_cell
from pretrain.ops.para_rnn.segment_kernels import (
    FIRST,
    FLAG_BITS,
    LAST,
    follow,
    follow_pair,
    from_before,
    special_blocks,
    tile_row,
)


@triton.jit
def _inputs(u, d_output, token, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, D: tl.constexpr):
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
def _before(states, token, ok, SPECIAL: tl.constexpr, AHEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Load the states before AHEAD tokens, 0 at the part's first, whose state is given."""
    h = ()
    for i in tl.static_range(AHEAD):
        here = ok
        if SPECIAL:
            here = (token - i > 0)[:, None] & ok
        h = h + (tl.load(states - (i + 1) * WIDTH, mask=here, other=0.0),)
    return h


@triton.jit
def _code(borders, token, i: tl.constexpr):
    """Load a token's border code; return it, its sequence's number, and whether it is an end."""
    code = tl.load(borders - i, mask=(token - i >= 0)[:, None], other=0)
    return code, (code >> FLAG_BITS).to(tl.int64), (code & FIRST) != 0, (code & LAST) != 0


@triton.jit
def _gru_map_block(
    x,
    r_x,
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
    """Step AHEAD tokens back with the map R, s (here x) of what enters the segment."""
    a_z, a_r, a_c, b_z, b_r, b_c = weights
    ok = channels < D
    u_z, u_r, u_c, g = _inputs(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before = _before(states, token, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        h = before[i].to(x.dtype)
        if SPECIAL:
            code, sequence, begins, ends = _code(borders, token, i)
            state = sequence * D + channels
            h = tl.load(initial + state, mask=begins & ok, other=h)
            x = tl.load(d_final + state, mask=ends & ok, other=x)
            cut = cut | (code & LAST)
        _v, jacobian, _r, _1, _2, _3 = gru_cell(
            h,
            u_z[i].to(h.dtype) + b_z,
            u_r[i].to(h.dtype) + b_r,
            u_c[i].to(h.dtype) + b_c,
            a_z,
            a_r,
            a_c,
            False,
        )
        x = x + g[i].to(h.dtype)
        x, r_x = jacobian * x, r_x * jacobian
    return x, r_x, cut


@triton.jit
def _gru_gradient_block(
    x,
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
    """Step AHEAD tokens back with the gradient x itself, and write what it gives."""
    a_z, a_r, a_c, b_z, b_r, b_c = weights
    da_z, da_r, da_c, db_z, db_r, db_c = sums
    ok = channels < D
    u_z, u_r, u_c, g = _inputs(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before = _before(states, token, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        h = before[i].to(x.dtype)
        here = ok
        if SPECIAL:
            code, sequence, begins, ends = _code(borders, token, i)
            state = sequence * D + channels
            h = tl.load(initial + state, mask=begins & ok, other=h)
            x = tl.load(d_final + state, mask=ends & ok, other=x)
            here = (token - i >= 0)[:, None] & ok
        _v, jacobian, r, to_z, to_r, to_c = gru_cell(
            h,
            u_z[i].to(h.dtype) + b_z,
            u_r[i].to(h.dtype) + b_r,
            u_c[i].to(h.dtype) + b_c,
            a_z,
            a_r,
            a_c,
            False,
        )
        x = x + g[i].to(h.dtype)
        d_z, d_r, d_c = x * to_z, x * to_r, x * to_c
        tl.store(d_u - i * 3 * D, d_z.to(d_u.dtype.element_ty), mask=here)
        tl.store(d_u - (i * 3 - 1) * D, d_r.to(d_u.dtype.element_ty), mask=here)
        tl.store(d_u - (i * 3 - 2) * D, d_c.to(d_u.dtype.element_ty), mask=here)
        da_z, da_r, da_c = da_z + d_z * h, da_r + d_r * h, da_c + d_c * (r * h)
        db_z, db_r, db_c = db_z + d_z, db_r + d_r, db_c + d_c
        x = jacobian * x
        if SPECIAL:
            tl.store(d_initial + state, x, mask=begins & ok)
            x = tl.where(begins, 0.0, x)
    return x, (da_z, da_r, da_c, db_z, db_r, db_c)


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
    """Do as :func:`_gru_map_block`; the transposed Jacobian goes back in time."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    ok = channels < D
    u_f, u_o, u_z, g = _inputs(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before_c = _before(states, token, ok, SPECIAL, AHEAD, 2 * D)
    before_h = _before(states + D, token, ok, SPECIAL, AHEAD, 2 * D)
    for i in tl.static_range(AHEAD):
        cell, h = before_c[i].to(x_c.dtype), before_h[i].to(x_c.dtype)
        if SPECIAL:
            code, sequence, begins, ends = _code(borders, token, i)
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
    """Do as :func:`_gru_gradient_block`."""
    a_f, a_o, a_z, c_f, c_o, b_f, b_o, b_z = weights
    da_f, da_o, da_z, dc_f, dc_o, db_f, db_o, db_z = sums
    ok = channels < D
    u_f, u_o, u_z, g = _inputs(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before_c = _before(states, token, ok, SPECIAL, AHEAD, 2 * D)
    before_h = _before(states + D, token, ok, SPECIAL, AHEAD, 2 * D)
    for i in tl.static_range(AHEAD):
        cell, h = before_c[i].to(x_c.dtype), before_h[i].to(x_c.dtype)
        here = ok
        if SPECIAL:
            code, sequence, begins, ends = _code(borders, token, i)
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
def _gru_backward_kernel(
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
    zeros = tl.zeros([S, C], wide)
    weights = a_z, a_r, a_c, b_z, b_r, b_c
    sums = zeros, zeros, zeros, zeros, zeros, zeros
    carry = tl.zeros([C], wide)
    for back in range(0, length, S * L):
        last = length - back - 1 - segment * L  # of each segment, whence it is walked back
        row = (start + last).to(tl.int64)[:, None]
        special = special_blocks(
            borders + start, last[:, None] - tl.arange(0, L)[None, :], length, L, AHEAD
        )
        r_x, x, cut = zeros + 1.0, zeros, tl.zeros([S, 1], tl.int32)
        of_u, of_h, of_g = u + row * (3 * D) + channels, states + row * D, d_output + row * D
        of_h, of_g, of_borders = of_h + channels, of_g + channels, borders + row
        for at in range(0, L, AHEAD):
            if (special >> (at // AHEAD)) & 1:
                x, r_x, cut = _gru_map_block(
                    x,
                    r_x,
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
                x, r_x, cut = _gru_map_block(
                    x,
                    r_x,
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
            of_u, of_h, of_g = of_u - AHEAD * 3 * D, of_h - AHEAD * D, of_g - AHEAD * D
            of_borders -= AHEAD
        cuts = cut + tl.zeros([S, C], tl.int32)
        cuts, r_x, x = tl.associative_scan((cuts, r_x, x), 0, follow)
        left = tl.where(cuts != 0, x, r_x * carry[None, :] + x)
        # Nothing comes from before the part.
        x = tl.where((last >= 0)[:, None], from_before(left, carry[None, :], S, C), 0.0)
        of_u, of_h, of_g = u + row * (3 * D) + channels, states + row * D, d_output + row * D
        of_h, of_g, of_borders = of_h + channels, of_g + channels, borders + row
        of_d = d_u + row * (3 * D) + channels
        for at in range(0, L, AHEAD):
            if (special >> (at // AHEAD)) & 1:
                x, sums = _gru_gradient_block(
                    x,
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
                x, sums = _gru_gradient_block(
                    x,
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
            of_u, of_h, of_g = of_u - AHEAD * 3 * D, of_h - AHEAD * D, of_g - AHEAD * D
            of_d, of_borders = of_d - AHEAD * 3 * D, of_borders - AHEAD
        carry = tile_row(x, segment, S - 1)
    columns = block * C + tl.arange(0, C)
    of_p, there = d_parameters + part * (6 * D) + columns, columns < D
    for i in tl.static_range(6):
        tl.store(of_p + i * D, tl.sum(sums[i], 0), mask=there)


@triton.jit
def _lstm_backward_kernel(
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


KERNELS = {"para_gru": _gru_backward_kernel, "para_lstm": _lstm_backward_kernel}
