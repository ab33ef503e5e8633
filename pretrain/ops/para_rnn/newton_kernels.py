"""ParaGRU and ParaLSTM (:mod:`pretrain.ops.para_rnn`): all Newton steps in one kernel.

The reverse solve with its local gradients is in :mod:`pretrain.ops.para_rnn.backward_kernels`.

A program owns some channels of one sequence and works through it in tiles of time, the tile's start
being exact before it begins. Within a tile the unknowns are p_l = h_{l-1}, so that no value is ever
needed from a neighbour: with f linearised at p, b_l = f(p_l) - J_l p_l, the next iterate follows
p_{l+1} = J_l p_l + b_l, an associative scan over time whose elements carry the map *before* their
last token (J, b: that token's; R, s: p = R start + s). What the scan predicts for h_l is compared
with f(p_l) one step later: that is the residual, and where it is small the tile is done. A tile
that does not get there is stepped through instead, in place, and counted. Backward is one such scan
from the end: lambda_l = g_l + J_{l+1}^T lambda_{l+1}.

Memory sees u (3 D per token) and the states (D, or 2 D) once forward; backward u, states, the
gradient of the output, and the gradient of u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell, lstm_cell, tile_row


@triton.jit
def _then(j1, b1, r1, s1, j2, b2, r2, s2):
    """Compose two segments forward, for one state; the first segment comes first.

    An element holds what precedes its segment's last token.
    """
    return j2, b2, r2 * (j1 * r1), r2 * (j1 * s1 + b1) + s2


@triton.jit
def _then_pair(
    ja1,
    jb1,
    jc1,
    jd1,
    b1,
    d1,
    ra1,
    rb1,
    rc1,
    rd1,
    s1,
    t1,
    ja2,
    jb2,
    jc2,
    jd2,
    b2,
    d2,
    ra2,
    rb2,
    rc2,
    rd2,
    s2,
    t2,
):
    """Compose forward, two states: matrices (a b; c d), vectors (b, d) and (s, t)."""
    pa, pb = ja1 * ra1 + jb1 * rc1, ja1 * rb1 + jb1 * rd1
    pc, pd = jc1 * ra1 + jd1 * rc1, jc1 * rb1 + jd1 * rd1
    q, w = ja1 * s1 + jb1 * t1 + b1, jc1 * s1 + jd1 * t1 + d1
    return (
        ja2,
        jb2,
        jc2,
        jd2,
        b2,
        d2,
        ra2 * pa + rb2 * pc,
        ra2 * pb + rb2 * pd,
        rc2 * pa + rd2 * pc,
        rc2 * pb + rd2 * pd,
        ra2 * q + rb2 * w + s2,
        rc2 * q + rd2 * w + t2,
    )


@triton.jit
def _gru_forward_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    residuals,
    failures,
    steps,
    cu_seqlens,
    D,
    tolerance,
    ITERATIONS: tl.constexpr,
    FALLBACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels, rows = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    ok = channels < D
    of_sequence = sequence.to(tl.int64) * D + channels
    carry = tl.load(initial + of_sequence, mask=ok, other=0.0)
    wide = carry.dtype
    a_z = tl.load(parameters + channels, mask=ok, other=0.0)
    a_r = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_c = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    b_r = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_c = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    az, ar, ac = a_z[None, :], a_r[None, :], a_c[None, :]
    worst, failed, most = tl.sum(carry, 0) * 0.0, 0, 0
    for first in range(0, length, BLOCK_T):
        token = start + first + rows
        here = (first + rows < length)[:, None] & ok[None, :]
        address = u + token[:, None] * (3 * D) + channels[None, :]
        u_z = tl.load(address, mask=here, other=0.0).to(wide) + b_z[None, :]
        u_r = tl.load(address + D, mask=here, other=0.0).to(wide) + b_r[None, :]
        u_c = tl.load(address + 2 * D, mask=here, other=0.0).to(wide) + b_c[None, :]
        previous = tl.zeros([BLOCK_T, BLOCK_D], wide) + carry[None, :]
        value, jacobian, r, to_z, to_r, to_c = gru_cell(previous, u_z, u_r, u_c, az, ar, ac)
        done, residual = 0, worst
        unsolved = True
        while unsolved:
            b = value - jacobian * previous
            _, _, by_start, offset = tl.associative_scan(
                (jacobian, b, value * 0.0 + 1.0, value * 0.0), 0, _then
            )
            previous = by_start * carry[None, :] + offset
            predicted = jacobian * previous + b
            value, jacobian, r, to_z, to_r, to_c = gru_cell(previous, u_z, u_r, u_c, az, ar, ac)
            # A number that is none counts as the worst of all.
            error = tl.where(here, tl.abs(value - predicted), 0.0)
            error = tl.where(error == error, error, float("inf"))
            residual = tl.max(tl.max(error, 1), 0)
            done += 1
            unsolved = (residual > tolerance) & (done < ITERATIONS) & (residual < float("inf"))
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        here_d = states + token[:, None] * D + channels[None, :]
        if (residual > tolerance) & FALLBACK:
            failed = 1
            for t in range(0, tl.minimum(length - first, BLOCK_T)):
                row = start + first + t
                address_t = u + row * (3 * D) + channels
                w_z = tl.load(address_t, mask=ok, other=0.0).to(wide) + b_z
                w_r = tl.load(address_t + D, mask=ok, other=0.0).to(wide) + b_r
                w_c = tl.load(address_t + 2 * D, mask=ok, other=0.0).to(wide) + b_c
                carry, _j, _r, _z, _q, _c = gru_cell(carry, w_z, w_r, w_c, a_z, a_r, a_c)
                tl.store(states + row * D + channels, carry.to(states.dtype.element_ty), mask=ok)
        else:
            tl.store(here_d, value.to(states.dtype.element_ty), mask=here)
            carry = tile_row(value, rows, tl.minimum(length - first, BLOCK_T) - 1)
    tl.store(final + of_sequence, carry, mask=ok)
    report = sequence * tl.num_programs(1) + block
    tl.store(residuals + report, worst)
    tl.store(failures + report, failed)
    tl.store(steps + report, most)


@triton.jit
def _lstm_forward_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    residuals,
    failures,
    steps,
    cu_seqlens,
    D,
    tolerance,
    ITERATIONS: tl.constexpr,
    FALLBACK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    sequence, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels, rows = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    ok = channels < D
    of_sequence = sequence.to(tl.int64) * (2 * D) + channels
    carry_c = tl.load(initial + of_sequence, mask=ok, other=0.0)
    carry_h = tl.load(initial + of_sequence + D, mask=ok, other=0.0)
    wide = carry_h.dtype
    a_f = tl.load(parameters + channels, mask=ok, other=0.0)
    a_o = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_z = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    c_f = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    c_o = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_f = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    b_o = tl.load(parameters + 6 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 7 * D + channels, mask=ok, other=0.0)
    af, ao, az, cf, co = a_f[None, :], a_o[None, :], a_z[None, :], c_f[None, :], c_o[None, :]
    worst, failed, most = tl.sum(carry_h, 0) * 0.0, 0, 0
    for first in range(0, length, BLOCK_T):
        token = start + first + rows
        here = (first + rows < length)[:, None] & ok[None, :]
        address = u + token[:, None] * (3 * D) + channels[None, :]
        u_f = tl.load(address, mask=here, other=0.0).to(wide) + b_f[None, :]
        u_o = tl.load(address + D, mask=here, other=0.0).to(wide) + b_o[None, :]
        u_z = tl.load(address + 2 * D, mask=here, other=0.0).to(wide) + b_z[None, :]
        zeros = tl.zeros([BLOCK_T, BLOCK_D], wide)
        before_c, before_h = zeros + carry_c[None, :], zeros + carry_h[None, :]
        cell, h, ja, jb, jc, jd, k1, k2, k3, k4 = lstm_cell(
            before_c, before_h, u_f, u_o, u_z, af, ao, az, cf, co
        )
        done, residual = 0, worst
        unsolved = True
        while unsolved:
            b = cell - ja * before_c - jb * before_h
            d = h - jc * before_c - jd * before_h
            _1, _2, _3, _4, _5, _6, ra, rb, rc, rd, s, t = tl.associative_scan(
                (ja, jb, jc, jd, b, d, zeros + 1.0, zeros, zeros, zeros + 1.0, zeros, zeros),
                0,
                _then_pair,
            )
            before_c = ra * carry_c[None, :] + rb * carry_h[None, :] + s
            before_h = rc * carry_c[None, :] + rd * carry_h[None, :] + t
            predicted_c = ja * before_c + jb * before_h + b
            predicted_h = jc * before_c + jd * before_h + d
            cell, h, ja, jb, jc, jd, k1, k2, k3, k4 = lstm_cell(
                before_c, before_h, u_f, u_o, u_z, af, ao, az, cf, co
            )
            error = tl.maximum(tl.abs(cell - predicted_c), tl.abs(h - predicted_h))
            finite = (cell - predicted_c == cell - predicted_c) & (h == h)
            error = tl.where(here, tl.where(finite, error, float("inf")), 0.0)
            residual = tl.max(tl.max(error, 1), 0)
            done += 1
            unsolved = (residual > tolerance) & (done < ITERATIONS) & (residual < float("inf"))
        worst, most = tl.maximum(worst, residual), tl.maximum(most, done)
        if (residual > tolerance) & FALLBACK:
            failed = 1
            for i in range(0, tl.minimum(length - first, BLOCK_T)):
                row = start + first + i
                address_t = u + row * (3 * D) + channels
                w_f = tl.load(address_t, mask=ok, other=0.0).to(wide) + b_f
                w_o = tl.load(address_t + D, mask=ok, other=0.0).to(wide) + b_o
                w_z = tl.load(address_t + 2 * D, mask=ok, other=0.0).to(wide) + b_z
                carry_c, carry_h, l1, l2, l3, l4, l5, l6, l7, l8 = lstm_cell(
                    carry_c, carry_h, w_f, w_o, w_z, a_f, a_o, a_z, c_f, c_o
                )
                out = states + row * (2 * D) + channels
                tl.store(out, carry_c.to(states.dtype.element_ty), mask=ok)
                tl.store(out + D, carry_h.to(states.dtype.element_ty), mask=ok)
        else:
            tile = states + token[:, None] * (2 * D) + channels[None, :]
            tl.store(tile, cell.to(states.dtype.element_ty), mask=here)
            tl.store(tile + D, h.to(states.dtype.element_ty), mask=here)
            last = tl.minimum(length - first, BLOCK_T) - 1
            carry_c, carry_h = tile_row(cell, rows, last), tile_row(h, rows, last)
    tl.store(final + of_sequence, carry_c, mask=ok)
    tl.store(final + of_sequence + D, carry_h, mask=ok)
    report = sequence * tl.num_programs(1) + block
    tl.store(residuals + report, worst)
    tl.store(failures + report, failed)
    tl.store(steps + report, most)


KERNELS = {"para_gru": _gru_forward_kernel, "para_lstm": _lstm_forward_kernel}
