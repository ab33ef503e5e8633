"""ParaGRU and ParaLSTM (:mod:`pretrain.ops.para_rnn`): all Newton steps in one kernel, and the
reverse solve with its local gradients in another.

A program owns some channels of one sequence and works it off in tiles of time, the tile's start
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

from pretrain.ops.shared.elementary_kernels import sigmoid, tanh


@triton.jit
def _gru(h, u_z, u_r, u_c, a_z, a_r, a_c):
    """h', dh'/dh, and what the gradients want: r, and h' by the pre-activations of z, r, c."""
    z = sigmoid(u_z + a_z * h)
    r = sigmoid(u_r + a_r * h)
    c = tanh(u_c + a_c * (r * h), False)
    to_z = (c - h) * z * (1.0 - z)
    to_c = z * (1.0 - c * c)
    to_r = to_c * a_c * h * r * (1.0 - r)
    jacobian = 1.0 - z + to_z * a_z + to_r * a_r + to_c * a_c * r
    return h + z * (c - h), jacobian, r, to_z, to_r, to_c


@triton.jit
def _lstm(cell, h, u_f, u_o, u_z, a_f, a_o, a_z, c_f, c_o):
    """c', h', the Jacobian by rows (to cell, to h), and what the gradients want."""
    f = sigmoid(u_f + a_f * h + c_f * cell)
    z = tanh(u_z + a_z * h, False)
    new = z + f * (cell - z)
    o = sigmoid(u_o + a_o * h + c_o * new)
    t = tanh(new, False)
    to_z = (1.0 - z * z) * (1.0 - f)
    to_f = (cell - z) * f * (1.0 - f)
    to_o = t * o * (1.0 - o)
    by_cell = o * (1.0 - t * t) + to_o * c_o
    j_cc = f + to_f * c_f
    j_ch = to_f * a_f + to_z * a_z
    j_hc = by_cell * j_cc
    j_hh = by_cell * j_ch + to_o * a_o
    return new, o * t, j_cc, j_ch, j_hc, j_hh, to_f, to_z, to_o, by_cell


@triton.jit
def _then(j1, b1, r1, s1, j2, b2, r2, s2):
    """Forward, one state: what precedes the last token of two stretches, the first one first."""
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
    """The same for two states: matrices (a b; c d), vectors (b, d) and (s, t)."""
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
def _back(j1, r1, s1, j2, r2, s2):
    """Backward, one state: 1 is the later stretch; lambda of the earlier one's first token."""
    return j2, r2 * (j1 * r1), r2 * (j1 * s1) + s2


@triton.jit
def _back_pair(
    ja1, jb1, jc1, jd1, ra1, rb1, rc1, rd1, s1, t1, ja2, jb2, jc2, jd2, ra2, rb2, rc2, rd2, s2, t2
):
    # The transposed Jacobian goes back in time.
    pa, pb = ja1 * ra1 + jc1 * rc1, ja1 * rb1 + jc1 * rd1
    pc, pd = jb1 * ra1 + jd1 * rc1, jb1 * rb1 + jd1 * rd1
    q, w = ja1 * s1 + jc1 * t1, jb1 * s1 + jd1 * t1
    return (
        ja2,
        jb2,
        jc2,
        jd2,
        ra2 * pa + rb2 * pc,
        ra2 * pb + rb2 * pd,
        rc2 * pa + rd2 * pc,
        rc2 * pb + rd2 * pd,
        ra2 * q + rb2 * w + s2,
        rc2 * q + rd2 * w + t2,
    )


@triton.jit
def _row(x, rows, index):
    """One row of a tile."""
    return tl.sum(tl.where((rows == index)[:, None], x, 0.0), 0)


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
        place = u + token[:, None] * (3 * D) + channels[None, :]
        u_z = tl.load(place, mask=here, other=0.0).to(wide) + b_z[None, :]
        u_r = tl.load(place + D, mask=here, other=0.0).to(wide) + b_r[None, :]
        u_c = tl.load(place + 2 * D, mask=here, other=0.0).to(wide) + b_c[None, :]
        previous = tl.zeros([BLOCK_T, BLOCK_D], wide) + carry[None, :]
        value, jacobian, r, to_z, to_r, to_c = _gru(previous, u_z, u_r, u_c, az, ar, ac)
        done, residual = 0, worst
        unsolved = True
        while unsolved:
            b = value - jacobian * previous
            _, _, by_start, offset = tl.associative_scan(
                (jacobian, b, value * 0.0 + 1.0, value * 0.0), 0, _then
            )
            previous = by_start * carry[None, :] + offset
            predicted = jacobian * previous + b
            value, jacobian, r, to_z, to_r, to_c = _gru(previous, u_z, u_r, u_c, az, ar, ac)
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
                place_t = u + row * (3 * D) + channels
                w_z = tl.load(place_t, mask=ok, other=0.0).to(wide) + b_z
                w_r = tl.load(place_t + D, mask=ok, other=0.0).to(wide) + b_r
                w_c = tl.load(place_t + 2 * D, mask=ok, other=0.0).to(wide) + b_c
                carry, _j, _r, _z, _q, _c = _gru(carry, w_z, w_r, w_c, a_z, a_r, a_c)
                tl.store(states + row * D + channels, carry.to(states.dtype.element_ty), mask=ok)
        else:
            tl.store(here_d, value.to(states.dtype.element_ty), mask=here)
            carry = _row(value, rows, tl.minimum(length - first, BLOCK_T) - 1)
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
        place = u + token[:, None] * (3 * D) + channels[None, :]
        u_f = tl.load(place, mask=here, other=0.0).to(wide) + b_f[None, :]
        u_o = tl.load(place + D, mask=here, other=0.0).to(wide) + b_o[None, :]
        u_z = tl.load(place + 2 * D, mask=here, other=0.0).to(wide) + b_z[None, :]
        zeros = tl.zeros([BLOCK_T, BLOCK_D], wide)
        before_c, before_h = zeros + carry_c[None, :], zeros + carry_h[None, :]
        cell, h, ja, jb, jc, jd, k1, k2, k3, k4 = _lstm(
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
            cell, h, ja, jb, jc, jd, k1, k2, k3, k4 = _lstm(
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
                place_t = u + row * (3 * D) + channels
                w_f = tl.load(place_t, mask=ok, other=0.0).to(wide) + b_f
                w_o = tl.load(place_t + D, mask=ok, other=0.0).to(wide) + b_o
                w_z = tl.load(place_t + 2 * D, mask=ok, other=0.0).to(wide) + b_z
                carry_c, carry_h, l1, l2, l3, l4, l5, l6, l7, l8 = _lstm(
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
            carry_c, carry_h = _row(cell, rows, last), _row(h, rows, last)
    tl.store(final + of_sequence, carry_c, mask=ok)
    tl.store(final + of_sequence + D, carry_h, mask=ok)
    report = sequence * tl.num_programs(1) + block
    tl.store(residuals + report, worst)
    tl.store(failures + report, failed)
    tl.store(steps + report, most)


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
    cu_seqlens,
    num_sequences,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot, block = tl.program_id(0), tl.program_id(1)
    channels, rows = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    ok = channels < D
    a_z = tl.load(parameters + channels, mask=ok, other=0.0)[None, :]
    a_r = tl.load(parameters + D + channels, mask=ok, other=0.0)[None, :]
    a_c = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)[None, :]
    b_z = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)[None, :]
    b_r = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)[None, :]
    b_c = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)[None, :]
    wide = a_z.dtype
    none = tl.zeros([BLOCK_D], wide)
    da_z, da_r, da_c, db_z, db_r, db_c = none, none, none, none, none, none
    for sequence in range(slot, num_sequences, tl.num_programs(0)):
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        of_sequence = tl.cast(sequence, tl.int64) * D + channels
        h_0 = tl.load(initial + of_sequence, mask=ok, other=0.0)
        carry = tl.load(d_final + of_sequence, mask=ok, other=0.0)
        num_tiles = (length + BLOCK_T - 1) // BLOCK_T
        for back in range(0, num_tiles):
            first = (num_tiles - 1 - back) * BLOCK_T
            token = start + first + rows
            here = (first + rows < length)[:, None] & ok[None, :]
            place = u + token[:, None] * (3 * D) + channels[None, :]
            u_z = tl.load(place, mask=here, other=0.0).to(wide) + b_z
            u_r = tl.load(place + D, mask=here, other=0.0).to(wide) + b_r
            u_c = tl.load(place + 2 * D, mask=here, other=0.0).to(wide) + b_c
            tile = token[:, None] * D + channels[None, :]
            inner = here & (first + rows > 0)[:, None]
            h = tl.load(states + tile - D, mask=inner, other=0.0).to(wide)
            h = tl.where((first + rows == 0)[:, None], h_0[None, :], h)
            g = tl.load(d_output + tile, mask=here, other=0.0).to(wide)
            value, jacobian, r, to_z, to_r, to_c = _gru(h, u_z, u_r, u_c, a_z, a_r, a_c)
            jacobian = tl.where(here, jacobian, 1.0)  # behind the end gradients pass through
            _, by_end, offset = tl.associative_scan(
                (jacobian, g * 0.0 + 1.0, g), 0, _back, reverse=True
            )
            cotangent = by_end * carry[None, :] + offset
            carry = _row(jacobian * cotangent, rows, 0)
            cotangent = tl.where(here, cotangent, 0.0)
            d_z, d_r, d_c = cotangent * to_z, cotangent * to_r, cotangent * to_c
            out = d_u + token[:, None] * (3 * D) + channels[None, :]
            tl.store(out, d_z.to(d_u.dtype.element_ty), mask=here)
            tl.store(out + D, d_r.to(d_u.dtype.element_ty), mask=here)
            tl.store(out + 2 * D, d_c.to(d_u.dtype.element_ty), mask=here)
            da_z += tl.sum(d_z * h, 0)
            da_r += tl.sum(d_r * h, 0)
            da_c += tl.sum(d_c * r * h, 0)
            db_z += tl.sum(d_z, 0)
            db_r += tl.sum(d_r, 0)
            db_c += tl.sum(d_c, 0)
        tl.store(d_initial + of_sequence, carry, mask=ok)
    out_p = d_parameters + slot * (6 * D) + channels
    tl.store(out_p, da_z, mask=ok)
    tl.store(out_p + D, da_r, mask=ok)
    tl.store(out_p + 2 * D, da_c, mask=ok)
    tl.store(out_p + 3 * D, db_z, mask=ok)
    tl.store(out_p + 4 * D, db_r, mask=ok)
    tl.store(out_p + 5 * D, db_c, mask=ok)


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
    cu_seqlens,
    num_sequences,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    slot, block = tl.program_id(0), tl.program_id(1)
    channels, rows = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_T)
    ok = channels < D
    a_f = tl.load(parameters + channels, mask=ok, other=0.0)[None, :]
    a_o = tl.load(parameters + D + channels, mask=ok, other=0.0)[None, :]
    a_z = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)[None, :]
    c_f = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)[None, :]
    c_o = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)[None, :]
    b_f = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)[None, :]
    b_o = tl.load(parameters + 6 * D + channels, mask=ok, other=0.0)[None, :]
    b_z = tl.load(parameters + 7 * D + channels, mask=ok, other=0.0)[None, :]
    wide = a_f.dtype
    none = tl.zeros([BLOCK_D], wide)
    da_f, da_o, da_z, dc_f, dc_o = none, none, none, none, none
    db_f, db_o, db_z = none, none, none
    for sequence in range(slot, num_sequences, tl.num_programs(0)):
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        of_sequence = tl.cast(sequence, tl.int64) * (2 * D) + channels
        c_0 = tl.load(initial + of_sequence, mask=ok, other=0.0)
        h_0 = tl.load(initial + of_sequence + D, mask=ok, other=0.0)
        carry_c = tl.load(d_final + of_sequence, mask=ok, other=0.0)
        carry_h = tl.load(d_final + of_sequence + D, mask=ok, other=0.0)
        num_tiles = (length + BLOCK_T - 1) // BLOCK_T
        for back in range(0, num_tiles):
            first = (num_tiles - 1 - back) * BLOCK_T
            token = start + first + rows
            here = (first + rows < length)[:, None] & ok[None, :]
            place = u + token[:, None] * (3 * D) + channels[None, :]
            u_f = tl.load(place, mask=here, other=0.0).to(wide) + b_f
            u_o = tl.load(place + D, mask=here, other=0.0).to(wide) + b_o
            u_z = tl.load(place + 2 * D, mask=here, other=0.0).to(wide) + b_z
            tile = states + token[:, None] * (2 * D) + channels[None, :]
            inner = here & (first + rows > 0)[:, None]
            cell = tl.load(tile - 2 * D, mask=inner, other=0.0).to(wide)
            h = tl.load(tile - D, mask=inner, other=0.0).to(wide)
            at_start = (first + rows == 0)[:, None]
            cell, h = tl.where(at_start, c_0[None, :], cell), tl.where(at_start, h_0[None, :], h)
            g = tl.load(d_output + token[:, None] * D + channels[None, :], mask=here, other=0.0).to(
                wide
            )
            new, out_h, ja, jb, jc, jd, to_f, to_z, to_o, by_cell = _lstm(
                cell, h, u_f, u_o, u_z, a_f, a_o, a_z, c_f, c_o
            )
            zeros = g * 0.0
            ja, jd = tl.where(here, ja, 1.0), tl.where(here, jd, 1.0)
            jb, jc = tl.where(here, jb, 0.0), tl.where(here, jc, 0.0)
            _1, _2, _3, _4, ra, rb, rc, rd, s, t = tl.associative_scan(
                (ja, jb, jc, jd, zeros + 1.0, zeros, zeros, zeros + 1.0, zeros, g),
                0,
                _back_pair,
                reverse=True,
            )
            l_c = ra * carry_c[None, :] + rb * carry_h[None, :] + s
            l_h = rc * carry_c[None, :] + rd * carry_h[None, :] + t
            carry_c = _row(ja * l_c + jc * l_h, rows, 0)
            carry_h = _row(jb * l_c + jd * l_h, rows, 0)
            l_c, l_h = tl.where(here, l_c, 0.0), tl.where(here, l_h, 0.0)
            d_new = l_c + l_h * by_cell
            d_f, d_o, d_z = d_new * to_f, l_h * to_o, d_new * to_z
            out = d_u + token[:, None] * (3 * D) + channels[None, :]
            tl.store(out, d_f.to(d_u.dtype.element_ty), mask=here)
            tl.store(out + D, d_o.to(d_u.dtype.element_ty), mask=here)
            tl.store(out + 2 * D, d_z.to(d_u.dtype.element_ty), mask=here)
            da_f += tl.sum(d_f * h, 0)
            da_o += tl.sum(d_o * h, 0)
            da_z += tl.sum(d_z * h, 0)
            dc_f += tl.sum(d_f * cell, 0)
            dc_o += tl.sum(d_o * new, 0)
            db_f += tl.sum(d_f, 0)
            db_o += tl.sum(d_o, 0)
            db_z += tl.sum(d_z, 0)
        tl.store(d_initial + of_sequence, carry_c, mask=ok)
        tl.store(d_initial + of_sequence + D, carry_h, mask=ok)
    out_p = d_parameters + slot * (8 * D) + channels
    tl.store(out_p, da_f, mask=ok)
    tl.store(out_p + D, da_o, mask=ok)
    tl.store(out_p + 2 * D, da_z, mask=ok)
    tl.store(out_p + 3 * D, dc_f, mask=ok)
    tl.store(out_p + 4 * D, dc_o, mask=ok)
    tl.store(out_p + 5 * D, db_f, mask=ok)
    tl.store(out_p + 6 * D, db_o, mask=ok)
    tl.store(out_p + 7 * D, db_z, mask=ok)


KERNELS = {
    "para_gru": (_gru_forward_kernel, _gru_backward_kernel),
    "para_lstm": (_lstm_forward_kernel, _lstm_backward_kernel),
}
