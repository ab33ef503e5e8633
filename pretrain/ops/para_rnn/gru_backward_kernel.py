"""ParaGRU backward by segments (:mod:`pretrain.ops.para_rnn.segment_kernels`)."""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell
from pretrain.ops.para_rnn.segment_kernels import (
    LAST,
    code_before,
    follow,
    from_before,
    inputs_back_from,
    special_blocks,
    states_before,
    tile_row,
)


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
    u_z, u_r, u_c, g = inputs_back_from(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before = states_before(states, token, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        h = before[i].to(x.dtype)
        if SPECIAL:
            code, sequence, begins, ends = code_before(borders, token, i)
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
    u_z, u_r, u_c, g = inputs_back_from(u, d_output, token, ok, SPECIAL, AHEAD, D)
    before = states_before(states, token, ok, SPECIAL, AHEAD, D)
    for i in tl.static_range(AHEAD):
        h = before[i].to(x.dtype)
        here = ok
        if SPECIAL:
            _code, sequence, begins, ends = code_before(borders, token, i)
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
def gru_backward_kernel(
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
    """Run ParaGRU backward over one part, for C of its channels."""
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
