"""ParaGRU and ParaLSTM forward by plain steps, one thread a channel, for batches that are wide.

Shooting does the work of a step some three times, so that time need not be walked through. Where
there are thousands of channels (of all sequences together) to keep the card busy anyway, walking is
less work: a step is a chain of two tanhs and its inputs are loaded eight tokens ahead. Backward is
that of shooting.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.shared.elementary_kernels import sigmoid, tanh

CHANNELS = 32  # of a program, one for each thread of its warp
AHEAD = 8  # tokens whose inputs are loaded while those before them are worked off


@triton.jit
def _gru_step(h, u_z, u_r, u_c, a_z, a_r, a_c, APPROXIMATE: tl.constexpr):
    z = sigmoid(u_z + a_z * h)
    r = sigmoid(u_r + a_r * h)
    return h + z * (tanh(u_c + a_c * (r * h), APPROXIMATE) - h)


@triton.jit
def _lstm_step(cell, h, u_f, u_o, u_z, a_f, a_o, a_z, c_f, c_o, APPROXIMATE: tl.constexpr):
    f = sigmoid(u_f + a_f * h + c_f * cell)
    z = tanh(u_z + a_z * h, APPROXIMATE)
    new = z + f * (cell - z)
    o = sigmoid(u_o + a_o * h + c_o * new)
    return new, o * tanh(new, APPROXIMATE)


@triton.jit
def _three(u, first, length, D, ok, AHEAD: tl.constexpr):
    """Load the inputs of AHEAD tokens from ``first`` on, 0 past the end of u's sequence."""
    a, b, c = (), (), ()
    for i in tl.static_range(AHEAD):
        address = u + (first + i) * (3 * D)
        here = ok & (first + i < length)
        a = a + (tl.load(address, mask=here, other=0.0),)
        b = b + (tl.load(address + D, mask=here, other=0.0),)
        c = c + (tl.load(address + 2 * D, mask=here, other=0.0),)
    return a, b, c


@triton.jit
def gru_steps_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    cu_seqlens,
    D,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Step ParaGRU through a sequence, for BLOCK_D of its channels."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = channels < D
    of_sequence = tl.cast(sequence, tl.int64) * D + channels
    h = tl.load(initial + of_sequence, mask=ok, other=0.0)
    wide: tl.constexpr = final.dtype.element_ty
    a_z = tl.load(parameters + channels, mask=ok, other=0.0)
    a_r = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_c = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    b_r = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_c = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    u += start * (3 * D) + channels
    states += start * D + channels
    u_z, u_r, u_c = _three(u, 0, length, D, ok, AHEAD)
    for first in range(0, length, AHEAD):
        next_z, next_r, next_c = _three(u, first + AHEAD, length, D, ok, AHEAD)
        for i in tl.static_range(AHEAD):
            here = first + i < length
            new = _gru_step(
                h,
                u_z[i].to(wide) + b_z,
                u_r[i].to(wide) + b_r,
                u_c[i].to(wide) + b_c,
                a_z,
                a_r,
                a_c,
                APPROXIMATE,
            )
            h = tl.where(here, new, h)
            tl.store(states + (first + i) * D, h.to(states.dtype.element_ty), mask=ok & here)
        u_z, u_r, u_c = next_z, next_r, next_c
    tl.store(final + of_sequence, h, mask=ok)


@triton.jit
def lstm_steps_kernel(
    u,
    parameters,
    initial,
    states,
    final,
    cu_seqlens,
    D,
    AHEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Step ParaLSTM through a sequence, for BLOCK_D of its channels."""
    sequence, block = tl.program_id(0), tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels = block * BLOCK_D + tl.arange(0, BLOCK_D)
    ok = channels < D
    of_sequence = tl.cast(sequence, tl.int64) * (2 * D) + channels
    cell = tl.load(initial + of_sequence, mask=ok, other=0.0)
    h = tl.load(initial + of_sequence + D, mask=ok, other=0.0)
    wide: tl.constexpr = final.dtype.element_ty
    a_f = tl.load(parameters + channels, mask=ok, other=0.0)
    a_o = tl.load(parameters + D + channels, mask=ok, other=0.0)
    a_z = tl.load(parameters + 2 * D + channels, mask=ok, other=0.0)
    c_f = tl.load(parameters + 3 * D + channels, mask=ok, other=0.0)
    c_o = tl.load(parameters + 4 * D + channels, mask=ok, other=0.0)
    b_f = tl.load(parameters + 5 * D + channels, mask=ok, other=0.0)
    b_o = tl.load(parameters + 6 * D + channels, mask=ok, other=0.0)
    b_z = tl.load(parameters + 7 * D + channels, mask=ok, other=0.0)
    u += start * (3 * D) + channels
    states += start * (2 * D) + channels
    u_f, u_o, u_z = _three(u, 0, length, D, ok, AHEAD)
    for first in range(0, length, AHEAD):
        next_f, next_o, next_z = _three(u, first + AHEAD, length, D, ok, AHEAD)
        for i in tl.static_range(AHEAD):
            here = first + i < length
            new, out = _lstm_step(
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
            cell, h = tl.where(here, new, cell), tl.where(here, out, h)
            row = states + (first + i) * (2 * D)
            tl.store(row, cell.to(states.dtype.element_ty), mask=ok & here)
            tl.store(row + D, h.to(states.dtype.element_ty), mask=ok & here)
        u_f, u_o, u_z = next_f, next_o, next_z
    tl.store(final + of_sequence, cell, mask=ok)
    tl.store(final + of_sequence + D, h, mask=ok)
