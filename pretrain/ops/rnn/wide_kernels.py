"""The classical cells (:mod:`pretrain.ops.rnn`) with heads wider than a multiprocessor can hold.

As in :mod:`pretrain.ops.rnn.step_kernels` a program owns one head of 8 sequences and walks through
time, but the recurrent matrices are read again for every token, tile by tile, from the L2 cache:
512 KB for an LSTM's head of 256 channels, some 5 microseconds. States are in memory: forward in
``final``, and h, as the product reads it, in ``out``; backward their gradients in ``d_initial``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.rnn.cell_kernels import clamp, gradients, next_state


@triton.jit
def _load(pointer, ok, wide: tl.constexpr):
    return tl.load(pointer, mask=ok, other=0.0).to(wide)


@triton.jit
def _add_product(into, w, ok, h, dtype: tl.constexpr):
    w_tile = tl.load(w, mask=ok, other=0.0).to(dtype)
    return into + tl.dot(w_tile, h, input_precision="ieee", out_dtype=into.dtype)


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
    BLOCK_FROM: tl.constexpr,
    SAVE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    which = block * BLOCK_B + tl.arange(0, BLOCK_B)
    sequence = tl.load(order + which, mask=which < num_sequences, other=0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    length = tl.where(which < num_sequences, length, 0)
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = final.dtype.element_ty
    size = tl.cast(num_sequences, tl.int64) * H * D
    all_rows = tl.cast(total, tl.int64) * H * D
    state_rows, bias_rows = (sequence * H + head) * D, H * D

    for t in range(0, tl.max(length, 0)):
        here = (t < length)[None, :]
        token = start + t
        rows = ((token * H + head) * D)[None, :]
        for first_channel in range(0, D, BLOCK_D):
            channels = first_channel + tl.arange(0, BLOCK_D)
            ok = channels < D
            alive = ok[:, None] & here
            address = x + ((token * (GATES * H) + head) * D)[None, :] + channels[:, None]
            own_bias = bias + head * D + channels
            g0 = _load(address, alive, wide) + _load(own_bias, ok, wide)[:, None]
            g1, g2, r2, g3 = g0, g0, g0 * 0.0, g0
            if GATES > 1:
                g1 = _load(address + H * D, alive, wide)
                g1 += _load(own_bias + bias_rows, ok, wide)[:, None]
                g2 = _load(address + 2 * H * D, alive, wide)
                g2 += _load(own_bias + 2 * bias_rows, ok, wide)[:, None]
            if CELL == "gru":
                r2 += _load(own_bias + 3 * bias_rows, ok, wide)[:, None]
            if GATES > 3:
                g3 = _load(address + 3 * H * D, alive, wide)
                g3 += _load(own_bias + 3 * bias_rows, ok, wide)[:, None]
            for first_from in range(0, D, BLOCK_FROM):
                origin = first_from + tl.arange(0, BLOCK_FROM)
                from_ok = origin < D
                h_ok = from_ok[:, None] & here
                h_pointer = initial + state_rows[None, :] + origin[:, None]
                h_from = tl.load(h_pointer, mask=h_ok & (t == 0), other=0.0).to(dtype)
                h_pointer = out + rows - H * D + origin[:, None]
                h_from += tl.load(h_pointer, mask=h_ok & (t > 0), other=0.0)
                # weight [H, from, gate, to]
                w = weight + (head * D + origin[None, :]) * (GATES * D) + channels[:, None]
                w_ok = ok[:, None] & from_ok[None, :]
                g0 = _add_product(g0, w, w_ok, h_from, dtype)
                if GATES > 1:
                    g1 = _add_product(g1, w + D, w_ok, h_from, dtype)
                    r2 = _add_product(r2, w + 2 * D, w_ok, h_from, dtype)
                if GATES > 3:
                    g3 = _add_product(g3, w + 3 * D, w_ok, h_from, dtype)
            state = final + state_rows[None, :] + channels[:, None]
            h = _load(state, alive, wide)
            cell, n, m = h, h, h  # where the cell has none
            if GATES > 3:
                cell = _load(state + size, alive, wide)
            if CELL == "slstm":
                n = _load(state + 2 * size, alive, wide)
                m = _load(state + 3 * size, alive, wide)
            h, cell, n, m = next_state(g0, g1, g2, r2, g3, h, cell, n, m, CELL, APPROXIMATE)
            row = rows + channels[:, None]
            tl.store(out + row, h.to(dtype), mask=alive)
            tl.store(state, h, mask=alive)
            if GATES > 3:
                tl.store(state + size, cell, mask=alive)
                if SAVE:
                    tl.store(saved + row, cell, mask=alive)
            if CELL == "slstm":
                tl.store(state + 2 * size, n, mask=alive)
                tl.store(state + 3 * size, m, mask=alive)
                if SAVE:
                    tl.store(saved + all_rows + row, n, mask=alive)
                    tl.store(saved + 2 * all_rows + row, m, mask=alive)
        tl.debug_barrier()  # the next token reads this one's h


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
    BLOCK_FROM: tl.constexpr,
    CLIP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    block, head = tl.program_id(0), tl.program_id(1)
    which = block * BLOCK_B + tl.arange(0, BLOCK_B)
    sequence = tl.load(order + which, mask=which < num_sequences, other=0).to(tl.int64)
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    length = tl.where(which < num_sequences, length, 0)
    dtype: tl.constexpr = x.dtype.element_ty
    wide: tl.constexpr = d_final.dtype.element_ty
    size = tl.cast(num_sequences, tl.int64) * H * D
    all_rows = tl.cast(total, tl.int64) * H * D
    state_rows, bias_rows = (sequence * H + head) * D, H * D
    limit = tl.cast(clip, wide)

    longest = tl.max(length, 0)
    for back in range(0, longest):
        t = longest - 1 - back
        here = (t < length)[None, :]
        token = start + t
        # products [H, T, gate, D]; overwritten by what is computed from them
        of_products = ((tl.cast(head, tl.int64) * total + token) * (GATES * D))[None, :]
        for first_channel in range(0, D, BLOCK_D):
            channels = first_channel + tl.arange(0, BLOCK_D)
            ok = channels < D
            alive = ok[:, None] & here
            first, inner = alive & (t == 0), alive & (t > 0)
            row = ((token * H + head) * D)[None, :] + channels[:, None]
            address = ((token * (GATES * H) + head) * D)[None, :] + channels[:, None]
            product = products + of_products + channels[:, None]
            own_bias = bias + head * D + channels
            in_states = state_rows[None, :] + channels[:, None]
            g0 = _load(x + address, alive, wide) + _load(own_bias, ok, wide)[:, None]
            g0 += _load(product, alive, wide)
            g1, g2, r2, g3, h, cell, n, m = g0, g0, g0, g0, g0, g0, g0, g0  # where there are none
            if GATES > 1:
                g1 = _load(x + address + H * D, alive, wide) + _load(product + D, alive, wide)
                g1 += _load(own_bias + bias_rows, ok, wide)[:, None]
                g2 = _load(x + address + 2 * H * D, alive, wide)
                g2 += _load(own_bias + 2 * bias_rows, ok, wide)[:, None]
                r2 = _load(product + 2 * D, alive, wide)
            dh = _load(d_initial + in_states, alive, wide)
            d = (clamp(dh, limit) if CLIP else dh) + _load(d_out + row, alive, wide)
            d_c, d_n, d_m = d, d, d
            if CELL == "gru":
                r2 += _load(own_bias + 3 * bias_rows, ok, wide)[:, None]
                h = _load(out + row - H * D, inner, wide) + _load(initial + in_states, first, wide)
            if GATES > 3:
                g3 = _load(x + address + 3 * H * D, alive, wide)
                g3 += _load(product + 3 * D, alive, wide)
                g3 += _load(own_bias + 3 * bias_rows, ok, wide)[:, None]
                cell = _load(saved + row - H * D, inner, wide)
                cell += _load(initial + size + in_states, first, wide)
                d_c = _load(d_initial + size + in_states, alive, wide)
                d_c = clamp(d_c, limit) if CLIP else d_c
            if CELL == "slstm":
                n = _load(saved + all_rows + row - H * D, inner, wide)
                n += _load(initial + 2 * size + in_states, first, wide)
                m = _load(saved + 2 * all_rows + row - H * D, inner, wide)
                m += _load(initial + 3 * size + in_states, first, wide)
                d_n = _load(d_initial + 2 * size + in_states, alive, wide)
                d_n = clamp(d_n, limit) if CLIP else d_n
                d_m = _load(d_initial + 3 * size + in_states, alive, wide)
                d_m = clamp(d_m, limit) if CLIP else d_m
            d0, d1, d2, d_r2, d3, before, d_c, d_n, d_m = gradients(
                g0, g1, g2, r2, g3, h, cell, n, m, d, d_c, d_n, d_m, CELL, APPROXIMATE
            )
            tl.debug_barrier()  # all have read what is overwritten
            tl.store(d_initial + in_states, before, mask=alive)
            tl.store(d_x + address, d0.to(dtype), mask=alive)
            tl.store(product, d0.to(dtype), mask=alive)
            if GATES > 1:
                tl.store(d_x + address + H * D, d1.to(dtype), mask=alive)
                tl.store(product + D, d1.to(dtype), mask=alive)
                tl.store(d_x + address + 2 * H * D, d2.to(dtype), mask=alive)
                tl.store(product + 2 * D, d_r2.to(dtype), mask=alive)
            if GATES > 3:
                tl.store(d_x + address + 3 * H * D, d3.to(dtype), mask=alive)
                tl.store(product + 3 * D, d3.to(dtype), mask=alive)
                tl.store(d_initial + size + in_states, d_c, mask=alive)
            if CELL == "slstm":
                tl.store(d_initial + 2 * size + in_states, d_n, mask=alive)
                tl.store(d_initial + 3 * size + in_states, d_m, mask=alive)
        tl.debug_barrier()  # the products below read all channels
        for first_channel in range(0, D, BLOCK_D):
            origin = first_channel + tl.arange(0, BLOCK_D)
            from_ok = origin < D
            alive = from_ok[:, None] & here
            state = d_initial + state_rows[None, :] + origin[:, None]
            dh = _load(state, alive, wide)
            for first_to in range(0, D, BLOCK_FROM):
                channels = first_to + tl.arange(0, BLOCK_FROM)
                ok = channels < D
                w = weight + (head * D + origin[:, None]) * (GATES * D) + channels[None, :]
                w_ok = from_ok[:, None] & ok[None, :]
                d = products + of_products + channels[:, None]
                for gate in tl.static_range(GATES):
                    d_gate = tl.load(d + gate * D, mask=ok[:, None] & here, other=0.0)
                    dh = _add_product(dh, w + gate * D, w_ok, d_gate, dtype)
            tl.store(state, dh, mask=alive)
        tl.debug_barrier()  # the token before reads these


KERNELS = (_forward_kernel, _backward_kernel)
