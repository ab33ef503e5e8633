"""The classical cells (:mod:`pretrain.ops.rnn`) with a head's recurrent matrices on chip.

A program owns one head of 8 sequences, the columns of a tensor-core tile, and walks through time;
sequences are taken longest first, so that those of a program end at about the same time. Forward it
writes every state. Backward what the recurrent matrices gave is computed again for all tokens at
once, by one large product; the kernel then needs the transposed matrices alone, and the matrices'
gradient is another large product over all tokens. A head of 128 channels has matrices of 32 KB per
gate in bfloat16: wider ones do not fit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.rnn.cell_kernels import clamp, gradients, next_state


@triton.jit
def _product(w, h, dtype: tl.constexpr, wide: tl.constexpr):
    return tl.dot(w, h.to(dtype), input_precision="ieee", out_dtype=wide)


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
    block, head = tl.program_id(0), tl.program_id(1)
    which = block * BLOCK_B + tl.arange(0, BLOCK_B)
    sequence = tl.load(order + which, mask=which < num_sequences, other=0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    length = tl.where(which < num_sequences, length, 0)
    channels = tl.arange(0, BLOCK_D)
    ok = channels < D
    there = (which < num_sequences)[None, :] & ok[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = final.dtype.element_ty

    # weight [H, from, gate, to], bias [gate, H, D], states [S, N, H, D]
    matrix = weight + (head * D + channels[None, :]) * (GATES * D) + channels[:, None]
    inside = ok[:, None] & ok[None, :]
    own_bias = bias + head * D + channels
    w0 = tl.load(matrix, mask=inside, other=0.0).to(dtype)
    b0 = tl.load(own_bias, mask=ok, other=0.0).to(wide)[:, None]
    if GATES > 1:
        w1 = tl.load(matrix + D, mask=inside, other=0.0).to(dtype)
        b1 = tl.load(own_bias + H * D, mask=ok, other=0.0).to(wide)[:, None]
        w2 = tl.load(matrix + 2 * D, mask=inside, other=0.0).to(dtype)
        b2 = tl.load(own_bias + 2 * H * D, mask=ok, other=0.0).to(wide)[:, None]
        b3 = tl.load(own_bias + 3 * H * D, mask=ok, other=0.0).to(wide)[:, None]
    if GATES > 3:
        w3 = tl.load(matrix + 3 * D, mask=inside, other=0.0).to(dtype)
    in_states = (sequence[None, :] * H + head) * D + channels[:, None]
    size = tl.cast(num_sequences, tl.int64) * H * D
    h = tl.load(initial + in_states, mask=there, other=0.0)
    cell, normaliser, stabiliser = h, h, h  # where the cell has none
    if (CELL == "lstm") | (CELL == "slstm"):
        cell = tl.load(initial + size + in_states, mask=there, other=0.0)
    if CELL == "slstm":
        normaliser = tl.load(initial + 2 * size + in_states, mask=there, other=0.0)
        stabiliser = tl.load(initial + 3 * size + in_states, mask=there, other=0.0)

    for t in range(0, tl.max(length, 0)):
        alive = (t < length)[None, :] & ok[:, None]
        token = (start + t)[None, :]
        address = x + (token * (GATES * H) + head) * D + channels[:, None]
        g0 = tl.load(address, mask=alive, other=0.0).to(wide) + b0 + _product(w0, h, dtype, wide)
        g1, g2, r2, g3 = g0, g0, g0, g0
        if GATES > 1:
            g1 = tl.load(address + H * D, mask=alive, other=0.0).to(wide) + b1
            g1 += _product(w1, h, dtype, wide)
            g2 = tl.load(address + 2 * H * D, mask=alive, other=0.0).to(wide) + b2
            r2 = _product(w2, h, dtype, wide)
        if CELL == "gru":
            r2 += b3
        if GATES > 3:
            g3 = tl.load(address + 3 * H * D, mask=alive, other=0.0).to(wide) + b3
            g3 += _product(w3, h, dtype, wide)
        new_h, new_cell, new_n, new_m = next_state(
            g0, g1, g2, r2, g3, h, cell, normaliser, stabiliser, CELL, APPROXIMATE
        )
        h = tl.where(alive, new_h, h)
        if (CELL == "lstm") | (CELL == "slstm"):
            cell = tl.where(alive, new_cell, cell)
        if CELL == "slstm":
            normaliser = tl.where(alive, new_n, normaliser)
            stabiliser = tl.where(alive, new_m, stabiliser)
        row = (token * H + head) * D + channels[:, None]
        tl.store(out + row, h.to(dtype), mask=alive)
        if SAVE:
            all_rows = tl.cast(total, tl.int64) * H * D
            if (CELL == "lstm") | (CELL == "slstm"):
                tl.store(saved + row, cell, mask=alive)
            if CELL == "slstm":
                tl.store(saved + all_rows + row, normaliser, mask=alive)
                tl.store(saved + 2 * all_rows + row, stabiliser, mask=alive)
    tl.store(final + in_states, h, mask=there)
    if (CELL == "lstm") | (CELL == "slstm"):
        tl.store(final + size + in_states, cell, mask=there)
    if CELL == "slstm":
        tl.store(final + 2 * size + in_states, normaliser, mask=there)
        tl.store(final + 3 * size + in_states, stabiliser, mask=there)


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
    block, head = tl.program_id(0), tl.program_id(1)
    which = block * BLOCK_B + tl.arange(0, BLOCK_B)
    sequence = tl.load(order + which, mask=which < num_sequences, other=0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    length = tl.where(which < num_sequences, length, 0)
    channels = tl.arange(0, BLOCK_D)
    ok = channels < D
    there = (which < num_sequences)[None, :] & ok[:, None]
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = d_final.dtype.element_ty

    # The matrices as they are: rows are what they come from, columns what they lead to.
    matrix = weight + (head * D + channels[:, None]) * (GATES * D) + channels[None, :]
    inside = ok[:, None] & ok[None, :]
    own_bias = bias + head * D + channels
    w0 = tl.load(matrix, mask=inside, other=0.0).to(dtype)
    b0 = tl.load(own_bias, mask=ok, other=0.0).to(wide)[:, None]
    if GATES > 1:
        w1 = tl.load(matrix + D, mask=inside, other=0.0).to(dtype)
        b1 = tl.load(own_bias + H * D, mask=ok, other=0.0).to(wide)[:, None]
        w2 = tl.load(matrix + 2 * D, mask=inside, other=0.0).to(dtype)
        b2 = tl.load(own_bias + 2 * H * D, mask=ok, other=0.0).to(wide)[:, None]
        b3 = tl.load(own_bias + 3 * H * D, mask=ok, other=0.0).to(wide)[:, None]
    if GATES > 3:
        w3 = tl.load(matrix + 3 * D, mask=inside, other=0.0).to(dtype)
    in_states = (sequence[None, :] * H + head) * D + channels[:, None]
    size = tl.cast(num_sequences, tl.int64) * H * D
    all_rows = tl.cast(total, tl.int64) * H * D
    limit = tl.cast(clip, wide)
    dh = tl.load(d_final + in_states, mask=there, other=0.0)
    if (CELL == "lstm") | (CELL == "slstm"):
        dc = tl.load(d_final + size + in_states, mask=there, other=0.0)
    if CELL == "slstm":
        dn = tl.load(d_final + 2 * size + in_states, mask=there, other=0.0)
        dm = tl.load(d_final + 3 * size + in_states, mask=there, other=0.0)

    longest = tl.max(length, 0)
    for back in range(0, longest):
        t = longest - 1 - back
        alive = (t < length)[None, :] & ok[:, None]
        first, inner = alive & (t == 0), alive & (t > 0)
        token = (start + t)[None, :]
        row = (token * H + head) * D + channels[:, None]
        address = (token * (GATES * H) + head) * D + channels[:, None]
        # products [H, T, gate, D]; overwritten by what is computed from them
        product = products + (tl.cast(head, tl.int64) * total + token) * (GATES * D)
        product += channels[:, None]
        g0 = tl.load(x + address, mask=alive, other=0.0).to(wide) + b0
        g0 += tl.load(product, mask=alive, other=0.0).to(wide)
        g1, g2, r2 = g0, g0, g0
        if GATES > 1:
            g1 = tl.load(x + address + H * D, mask=alive, other=0.0).to(wide) + b1
            g1 += tl.load(product + D, mask=alive, other=0.0).to(wide)
            g2 = tl.load(x + address + 2 * H * D, mask=alive, other=0.0).to(wide) + b2
            r2 = tl.load(product + 2 * D, mask=alive, other=0.0).to(wide)
        carried = clamp(dh, limit) if CLIP else dh
        d = carried + tl.load(d_out + row, mask=alive, other=0.0).to(wide)
        g3, h, cell, n, m, d_c, d_n, d_m = g0, g0, g0, g0, g0, d, d, d  # where there are none
        if CELL == "gru":
            r2 += b3
            h = tl.load(out + row - H * D, mask=inner, other=0.0).to(wide)
            h += tl.load(initial + in_states, mask=first, other=0.0)
        if GATES > 3:
            g3 = tl.load(x + address + 3 * H * D, mask=alive, other=0.0).to(wide) + b3
            g3 += tl.load(product + 3 * D, mask=alive, other=0.0).to(wide)
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
        d0, d1, d2, d_r2, d3, before, d_c, d_n, d_m = gradients(
            g0, g1, g2, r2, g3, h, cell, n, m, d, d_c, d_n, d_m, CELL, APPROXIMATE
        )
        if GATES > 3:
            dc = tl.where(alive, d_c, dc)
        if CELL == "slstm":
            dn = tl.where(alive, d_n, dn)
            dm = tl.where(alive, d_m, dm)

        tl.debug_barrier()  # all have read the products
        d0 = tl.where(alive, d0, 0.0)
        tl.store(d_x + address, d0.to(dtype), mask=alive)
        tl.store(product, d0.to(dtype), mask=alive)
        before += _product(w0, d0, dtype, wide)
        if GATES > 1:
            d1, d2 = tl.where(alive, d1, 0.0), tl.where(alive, d2, 0.0)
            d_r2 = tl.where(alive, d_r2, 0.0)
            tl.store(d_x + address + H * D, d1.to(dtype), mask=alive)
            tl.store(product + D, d1.to(dtype), mask=alive)
            tl.store(d_x + address + 2 * H * D, d2.to(dtype), mask=alive)
            tl.store(product + 2 * D, d_r2.to(dtype), mask=alive)
            before += _product(w1, d1, dtype, wide) + _product(w2, d_r2, dtype, wide)
        if GATES > 3:
            d3 = tl.where(alive, d3, 0.0)
            tl.store(d_x + address + 3 * H * D, d3.to(dtype), mask=alive)
            tl.store(product + 3 * D, d3.to(dtype), mask=alive)
            before += _product(w3, d3, dtype, wide)
        dh = tl.where(alive, before, dh)
    tl.store(d_initial + in_states, dh, mask=there)
    if (CELL == "lstm") | (CELL == "slstm"):
        tl.store(d_initial + size + in_states, dc, mask=there)
    if CELL == "slstm":
        tl.store(d_initial + 2 * size + in_states, dn, mask=there)
        tl.store(d_initial + 3 * size + in_states, dm, mask=there)


KERNELS = (_forward_kernel, _backward_kernel)
