"""ParaGRU and ParaLSTM backward: the reverse solve with its local gradients in one kernel.

How sequences are cut into tiles is in :mod:`pretrain.ops.para_rnn.newton_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.para_rnn.cell_kernels import gru_cell, lstm_cell, tile_row


@triton.jit
def _back(j1, r1, s1, j2, r2, s2):
    """Compose two segments backward, for one state.

    1 is the later segment; the result carries lambda of the earlier one's first token.
    """
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
            address = u + token[:, None] * (3 * D) + channels[None, :]
            u_z = tl.load(address, mask=here, other=0.0).to(wide) + b_z
            u_r = tl.load(address + D, mask=here, other=0.0).to(wide) + b_r
            u_c = tl.load(address + 2 * D, mask=here, other=0.0).to(wide) + b_c
            tile = token[:, None] * D + channels[None, :]
            inner = here & (first + rows > 0)[:, None]
            h = tl.load(states + tile - D, mask=inner, other=0.0).to(wide)
            h = tl.where((first + rows == 0)[:, None], h_0[None, :], h)
            g = tl.load(d_output + tile, mask=here, other=0.0).to(wide)
            value, jacobian, r, to_z, to_r, to_c = gru_cell(h, u_z, u_r, u_c, a_z, a_r, a_c)
            jacobian = tl.where(here, jacobian, 1.0)  # after the end gradients pass through
            _, by_end, offset = tl.associative_scan(
                (jacobian, g * 0.0 + 1.0, g), 0, _back, reverse=True
            )
            cotangent = by_end * carry[None, :] + offset
            carry = tile_row(jacobian * cotangent, rows, 0)
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
            address = u + token[:, None] * (3 * D) + channels[None, :]
            u_f = tl.load(address, mask=here, other=0.0).to(wide) + b_f
            u_o = tl.load(address + D, mask=here, other=0.0).to(wide) + b_o
            u_z = tl.load(address + 2 * D, mask=here, other=0.0).to(wide) + b_z
            tile = states + token[:, None] * (2 * D) + channels[None, :]
            inner = here & (first + rows > 0)[:, None]
            cell = tl.load(tile - 2 * D, mask=inner, other=0.0).to(wide)
            h = tl.load(tile - D, mask=inner, other=0.0).to(wide)
            at_start = (first + rows == 0)[:, None]
            cell, h = tl.where(at_start, c_0[None, :], cell), tl.where(at_start, h_0[None, :], h)
            g = tl.load(d_output + token[:, None] * D + channels[None, :], mask=here, other=0.0).to(
                wide
            )
            new, out_h, ja, jb, jc, jd, to_f, to_z, to_o, by_cell = lstm_cell(
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
            carry_c = tile_row(ja * l_c + jc * l_h, rows, 0)
            carry_h = tile_row(jb * l_c + jd * l_h, rows, 0)
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


KERNELS = {"para_gru": _gru_backward_kernel, "para_lstm": _lstm_backward_kernel}
