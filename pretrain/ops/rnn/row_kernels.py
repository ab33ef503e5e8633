"""The classical cells (:mod:`pretrain.ops.rnn`) for few sequences, of narrow heads.

Where tiles of 8 sequences would leave most of a card idle, a program owns one head of one sequence.
Its recurrent matrices stay in registers, in float32, and the products are sums over the rows that a
thread holds: a step takes more instructions than a tile's, but a third of its barriers, and eight
sequences of 16 heads are 128 programs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.rnn.cell_kernels import clamp, gradients, next_state


@triton.jit
def _product(w, h):
    return tl.sum(w * h[None, :], 1)


@triton.jit(do_not_specialize=["total", "num_sequences"])
def _forward_kernel(
    x,
    weight,
    bias,
    initial,
    out,
    saved,
    final,
    cu_seqlens,
    order,
    total,
    num_sequences,
    H: tl.constexpr,
    D: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SAVE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    sequence = tl.load(order + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels = tl.arange(0, BLOCK_D)
    ok = channels < D
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = final.dtype.element_ty

    # weight [H, to, gate, from], bias [gate, H, D], states [S, N, H, D]
    matrix = weight + (head * D + channels[:, None]) * (GATES * D) + channels[None, :]
    inside = ok[:, None] & ok[None, :]
    own_bias = bias + head * D + channels
    w0 = tl.load(matrix, mask=inside, other=0.0).to(dtype).to(wide)
    b0 = tl.load(own_bias, mask=ok, other=0.0).to(wide)
    if GATES > 1:
        w1 = tl.load(matrix + D, mask=inside, other=0.0).to(dtype).to(wide)
        b1 = tl.load(own_bias + H * D, mask=ok, other=0.0).to(wide)
        w2 = tl.load(matrix + 2 * D, mask=inside, other=0.0).to(dtype).to(wide)
        b2 = tl.load(own_bias + 2 * H * D, mask=ok, other=0.0).to(wide)
        b3 = tl.load(own_bias + 3 * H * D, mask=ok, other=0.0).to(wide)
    if GATES > 3:
        w3 = tl.load(matrix + 3 * D, mask=inside, other=0.0).to(dtype).to(wide)
    in_states = (sequence * H + head) * D + channels
    size = tl.cast(num_sequences, tl.int64) * H * D
    all_rows = tl.cast(total, tl.int64) * H * D
    h = tl.load(initial + in_states, mask=ok, other=0.0)
    cell, normaliser, stabiliser = h, h, h  # where the cell has none
    if GATES > 3:
        cell = tl.load(initial + size + in_states, mask=ok, other=0.0)
    if CELL == "slstm":
        normaliser = tl.load(initial + 2 * size + in_states, mask=ok, other=0.0)
        stabiliser = tl.load(initial + 3 * size + in_states, mask=ok, other=0.0)

    address = x + (start * (GATES * H) + head) * D + channels
    row = (start * H + head) * D + channels
    for _t in range(0, length):
        before = h.to(dtype).to(wide)
        g0 = tl.load(address, mask=ok, other=0.0).to(wide) + b0 + _product(w0, before)
        g1, g2, r2, g3 = g0, g0, g0, g0
        if GATES > 1:
            g1 = tl.load(address + H * D, mask=ok, other=0.0).to(wide) + b1
            g1 += _product(w1, before)
            g2 = tl.load(address + 2 * H * D, mask=ok, other=0.0).to(wide) + b2
            r2 = _product(w2, before)
        if CELL == "gru":
            r2 += b3
        if GATES > 3:
            g3 = tl.load(address + 3 * H * D, mask=ok, other=0.0).to(wide) + b3
            g3 += _product(w3, before)
        h, cell, normaliser, stabiliser = next_state(
            g0, g1, g2, r2, g3, h, cell, normaliser, stabiliser, CELL, APPROXIMATE
        )
        tl.store(out + row, h.to(dtype), mask=ok)
        if SAVE:
            if GATES > 3:
                tl.store(saved + row, cell, mask=ok)
            if CELL == "slstm":
                tl.store(saved + all_rows + row, normaliser, mask=ok)
                tl.store(saved + 2 * all_rows + row, stabiliser, mask=ok)
        address += GATES * H * D
        row += H * D
    tl.store(final + in_states, h, mask=ok)
    if GATES > 3:
        tl.store(final + size + in_states, cell, mask=ok)
    if CELL == "slstm":
        tl.store(final + 2 * size + in_states, normaliser, mask=ok)
        tl.store(final + 3 * size + in_states, stabiliser, mask=ok)


@triton.jit(do_not_specialize=["total", "num_sequences"])
def _backward_kernel(
    x,
    weight,
    bias,
    initial,
    out,
    saved,
    products,
    d_out,
    d_final,
    d_x,
    d_initial,
    cu_seqlens,
    order,
    total,
    num_sequences,
    clip,
    H: tl.constexpr,
    D: tl.constexpr,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CLIP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    sequence = tl.load(order + tl.program_id(0)).to(tl.int64)
    head = tl.program_id(1)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    channels = tl.arange(0, BLOCK_D)
    ok = channels < D
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = d_final.dtype.element_ty

    # weight [H, from, gate, to]: rows are what they come from, columns what they lead to.
    matrix = weight + (head * D + channels[:, None]) * (GATES * D) + channels[None, :]
    inside = ok[:, None] & ok[None, :]
    own_bias = bias + head * D + channels
    w0 = tl.load(matrix, mask=inside, other=0.0).to(dtype).to(wide)
    b0 = tl.load(own_bias, mask=ok, other=0.0).to(wide)
    if GATES > 1:
        w1 = tl.load(matrix + D, mask=inside, other=0.0).to(dtype).to(wide)
        b1 = tl.load(own_bias + H * D, mask=ok, other=0.0).to(wide)
        w2 = tl.load(matrix + 2 * D, mask=inside, other=0.0).to(dtype).to(wide)
        b2 = tl.load(own_bias + 2 * H * D, mask=ok, other=0.0).to(wide)
        b3 = tl.load(own_bias + 3 * H * D, mask=ok, other=0.0).to(wide)
    if GATES > 3:
        w3 = tl.load(matrix + 3 * D, mask=inside, other=0.0).to(dtype).to(wide)
    in_states = (sequence * H + head) * D + channels
    size = tl.cast(num_sequences, tl.int64) * H * D
    all_rows = tl.cast(total, tl.int64) * H * D
    limit = tl.cast(clip, wide)
    dh = tl.load(d_final + in_states, mask=ok, other=0.0)
    dc, dn, dm = dh, dh, dh  # where the cell has none
    if GATES > 3:
        dc = tl.load(d_final + size + in_states, mask=ok, other=0.0)
    if CELL == "slstm":
        dn = tl.load(d_final + 2 * size + in_states, mask=ok, other=0.0)
        dm = tl.load(d_final + 3 * size + in_states, mask=ok, other=0.0)

    for back in range(0, length):
        t = length - 1 - back
        first, inner = ok & (t == 0), ok & (t > 0)
        token = start + t
        row = (token * H + head) * D + channels
        address = (token * (GATES * H) + head) * D + channels
        # products [H, T, gate, D]; overwritten by what is computed from them
        product = products + (tl.cast(head, tl.int64) * total + token) * (GATES * D) + channels
        g0 = tl.load(x + address, mask=ok, other=0.0).to(wide) + b0
        g0 += tl.load(product, mask=ok, other=0.0).to(wide)
        g1, g2, r2, g3, h, cell, n, m = g0, g0, g0, g0, g0, g0, g0, g0  # where there are none
        if GATES > 1:
            g1 = tl.load(x + address + H * D, mask=ok, other=0.0).to(wide) + b1
            g1 += tl.load(product + D, mask=ok, other=0.0).to(wide)
            g2 = tl.load(x + address + 2 * H * D, mask=ok, other=0.0).to(wide) + b2
            r2 = tl.load(product + 2 * D, mask=ok, other=0.0).to(wide)
        d = (clamp(dh, limit) if CLIP else dh) + tl.load(d_out + row, mask=ok, other=0.0).to(wide)
        d_c, d_n, d_m = d, d, d
        if CELL == "gru":
            r2 += b3
            h = tl.load(out + row - H * D, mask=inner, other=0.0).to(wide)
            h += tl.load(initial + in_states, mask=first, other=0.0)
        if GATES > 3:
            g3 = tl.load(x + address + 3 * H * D, mask=ok, other=0.0).to(wide) + b3
            g3 += tl.load(product + 3 * D, mask=ok, other=0.0).to(wide)
            cell = tl.load(saved + row - H * D, mask=inner, other=0.0)
            cell += tl.load(initial + size + in_states, mask=first, other=0.0)
            d_c = clamp(dc, limit) if CLIP else dc
        if CELL == "slstm":
            n = tl.load(saved + all_rows + row - H * D, mask=inner, other=0.0)
            n += tl.load(initial + 2 * size + in_states, mask=first, other=0.0)
            m = tl.load(saved + 2 * all_rows + row - H * D, mask=inner, other=0.0)
            m += tl.load(initial + 3 * size + in_states, mask=first, other=0.0)
            d_n = clamp(dn, limit) if CLIP else dn
            d_m = clamp(dm, limit) if CLIP else dm
        d0, d1, d2, d_r2, d3, dh, dc, dn, dm = gradients(
            g0, g1, g2, r2, g3, h, cell, n, m, d, d_c, d_n, d_m, CELL, APPROXIMATE
        )
        tl.debug_barrier()  # all have read the products
        tl.store(d_x + address, d0.to(dtype), mask=ok)
        tl.store(product, d0.to(dtype), mask=ok)
        dh += _product(w0, d0.to(dtype).to(wide))
        if GATES > 1:
            tl.store(d_x + address + H * D, d1.to(dtype), mask=ok)
            tl.store(product + D, d1.to(dtype), mask=ok)
            tl.store(d_x + address + 2 * H * D, d2.to(dtype), mask=ok)
            tl.store(product + 2 * D, d_r2.to(dtype), mask=ok)
            dh += _product(w1, d1.to(dtype).to(wide)) + _product(w2, d_r2.to(dtype).to(wide))
        if GATES > 3:
            tl.store(d_x + address + 3 * H * D, d3.to(dtype), mask=ok)
            tl.store(product + 3 * D, d3.to(dtype), mask=ok)
            dh += _product(w3, d3.to(dtype).to(wide))
    tl.store(d_initial + in_states, dh, mask=ok)
    if GATES > 3:
        tl.store(d_initial + size + in_states, dc, mask=ok)
    if CELL == "slstm":
        tl.store(d_initial + 2 * size + in_states, dn, mask=ok)
        tl.store(d_initial + 3 * size + in_states, dm, mask=ok)


KERNELS = (_forward_kernel, _backward_kernel)
