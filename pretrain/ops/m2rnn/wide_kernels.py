"""M2RNN's recurrence (:mod:`pretrain.ops.m2rnn`) with heads wider than a multiprocessor can hold.

As in :mod:`pretrain.ops.m2rnn.step_kernels` a program takes some rows of the state of one head of
one sequence, but W is read again for every token, tile by tile, from the L2 cache, and so is the
state: a head of 256 value channels has 128 KB of W. Backward goes from chunk to chunk to the front:
forward once more, with the states and tanhs of all of its tokens left in a scratch, then back, and
what the chunk adds to the gradient of W is one product over its tokens and rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.shared.elementary_kernels import tanh


@triton.jit
def _product(
    into,
    left,
    weight,
    columns,
    V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    dtype: tl.constexpr,
):
    """Add to ``into`` the product of the rows at ``left`` ``[rows, 1]`` and W, or its transpose."""
    for first in range(0, V, BLOCK_C):
        inner = first + tl.arange(0, BLOCK_C)
        ok = inner < V
        x = tl.load(left + inner[None, :], mask=ok[None, :], other=0.0)
        if TRANSPOSED:
            address = weight + columns[None, :] * V + inner[:, None]
        else:
            address = weight + inner[:, None] * V + columns[None, :]
        w = tl.load(address, mask=ok[:, None] & (columns < V)[None, :], other=0.0).to(dtype)
        into += tl.dot(x, w, input_precision="ieee", out_dtype=into.dtype)
    return into


@triton.jit(do_not_specialize=["total"])
def _forward_kernel(
    q,
    k,
    v,
    weight,
    forget,
    initial,
    y,
    final,
    checkpoints,
    cu_seqlens,
    chunk_starts,
    total,
    num_heads: tl.constexpr,
    q_heads: tl.constexpr,
    k_heads: tl.constexpr,
    narrow,  # [programs, 2, BLOCK_K, V]: the state before and after a token, as W multiplies it
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    SAVE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own_rows = tl.arange(0, BLOCK_K)
    rows = part * BLOCK_K + own_rows
    row_ok = rows < K
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    chunk = tl.load(chunk_starts + sequence).to(tl.int64)
    dtype: tl.constexpr = q.dtype.element_ty
    wide: tl.constexpr = final.dtype.element_ty
    weight += head * V * V
    of_sequence = (sequence.to(tl.int64) * num_heads + head) * K * V
    program = (sequence.to(tl.int64) * num_heads + head) * tl.num_programs(2) + part
    narrow += (program * 2 * BLOCK_K + own_rows[:, None]) * V

    for first in range(0, V, BLOCK_V):
        columns = first + tl.arange(0, BLOCK_V)
        ok = row_ok[:, None] & (columns < V)[None, :]
        at = of_sequence + rows[:, None] * V + columns[None, :]
        h = tl.load(initial + at, mask=ok, other=0.0)
        tl.store(final + at, h, mask=ok)
        tl.store(narrow + columns[None, :], h.to(dtype), mask=(columns < V)[None, :])
    tl.debug_barrier()
    q_head, k_head = head // (num_heads // q_heads), head // (num_heads // k_heads)
    for t in range(0, length):
        token = start + t
        q_t = tl.load(q + (token * q_heads + q_head) * K + rows, mask=row_ok, other=0.0).to(wide)
        k_t = tl.load(k + (token * k_heads + k_head) * K + rows, mask=row_ok, other=0.0).to(wide)
        f_t = tl.load(forget + token * num_heads + head).to(wide)
        before = narrow + (t % 2) * BLOCK_K * V
        after = narrow + (1 - t % 2) * BLOCK_K * V
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            column_ok = columns < V
            ok = row_ok[:, None] & column_ok[None, :]
            at = rows[:, None] * V + columns[None, :]
            of_token = (token * num_heads + head) * V + columns
            v_t = tl.load(v + of_token, mask=column_ok, other=0.0).to(wide)
            h = tl.load(final + of_sequence + at, mask=ok, other=0.0)
            if SAVE:
                if t % CHUNK == 0:
                    address = checkpoints + ((chunk + t // CHUNK) * num_heads + head) * K * V
                    tl.store(address + at, h, mask=ok)
            x = _product(
                k_t[:, None] * v_t[None, :], before, weight, columns, V, BLOCK_C, False, dtype
            )
            z = tanh(x, APPROXIMATE)
            h = z + f_t * (h - z)
            tl.store(final + of_sequence + at, h, mask=ok)
            tl.store(after + columns[None, :], h.to(dtype), mask=column_ok[None, :])
            read = tl.sum(q_t[:, None] * h, 0).to(y.dtype.element_ty)
            tl.store(
                y + part * tl.cast(total, tl.int64) * num_heads * V + of_token, read, column_ok
            )
        tl.debug_barrier()


@triton.jit(do_not_specialize=["total", "num_sequences", "segment_total", "done", "most"])
def _backward_kernel(
    q,
    k,
    v,
    weight,
    forget,
    checkpoints,
    dy,
    d_after,
    dq,
    dk,
    dv,
    df,
    dw,
    d_before,
    states,  # [programs, CHUNK + 1, BLOCK_K, V]
    cu_seqlens,
    chunk_starts,
    first_rows,
    total,
    segment_total,
    num_sequences,
    done,
    most,
    clip,
    num_heads: tl.constexpr,
    q_heads: tl.constexpr,
    k_heads: tl.constexpr,
    tanhs,  # [programs, CHUNK, BLOCK_K, V]
    dxs,  # the same, in the inputs' dtype
    running,  # [programs, BLOCK_K, V]
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNK: tl.constexpr,
    CLIP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    own_rows = tl.arange(0, BLOCK_K)
    rows = part * BLOCK_K + own_rows
    row_ok = rows < K
    dtype: tl.constexpr = q.dtype.element_ty
    wide: tl.constexpr = d_after.dtype.element_ty
    weight += head * V * V
    limit = tl.cast(clip, wide)
    q_head, k_head = head // (num_heads // q_heads), head // (num_heads // k_heads)
    program = (slot.to(tl.int64) * num_heads + head) * tl.num_programs(2) + part
    size: tl.constexpr = BLOCK_K * V
    states += program * (CHUNK + 1) * size + own_rows[:, None] * V
    tanhs += program * CHUNK * size + own_rows[:, None] * V
    dxs += program * CHUNK * size + own_rows[:, None] * V
    running += program * size + own_rows[:, None] * V
    dw += ((part * tl.num_programs(0) + slot) * num_heads + head) * V * V
    parts_of_v = part * tl.cast(segment_total, tl.int64)

    for sequence in range(slot, num_sequences, tl.num_programs(0)):
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        chunk = tl.load(chunk_starts + sequence).to(tl.int64)
        of_sequence = (tl.cast(sequence, tl.int64) * num_heads + head) * K * V
        num_chunks = (length + CHUNK - 1) // CHUNK
        until = tl.minimum(num_chunks, done + most)
        place_of_start = tl.load(first_rows + sequence) - (num_chunks - until) * CHUNK
        gradient = d_before + of_sequence + rows[:, None] * V
        for first in range(0, V, BLOCK_V):
            columns = first + tl.arange(0, BLOCK_V)
            ok = row_ok[:, None] & (columns < V)[None, :]
            at = of_sequence + rows[:, None] * V + columns[None, :]
            dh = tl.load(d_after + at, mask=ok, other=0.0)
            tl.store(gradient + columns[None, :], dh, mask=ok)
        for back in range(done, until):
            c = num_chunks - 1 - back
            first_token, row = start + c * CHUNK, place_of_start + c * CHUNK
            count = tl.minimum(length - c * CHUNK, CHUNK)
            address = checkpoints + ((chunk + c) * num_heads + head) * K * V + rows[:, None] * V
            for first in range(0, V, BLOCK_V):
                columns = first + tl.arange(0, BLOCK_V)
                column_ok = (columns < V)[None, :]
                h = tl.load(address + columns[None, :], mask=row_ok[:, None] & column_ok, other=0.0)
                tl.store(running + columns[None, :], h, mask=column_ok)
                tl.store(states + columns[None, :], h.to(dtype), mask=column_ok)
            tl.debug_barrier()
            for t in range(0, count):
                token = first_token + t
                k_t = tl.load(k + (token * k_heads + k_head) * K + rows, mask=row_ok, other=0.0)
                f_t = tl.load(forget + token * num_heads + head).to(wide)
                for first in range(0, V, BLOCK_V):
                    columns = first + tl.arange(0, BLOCK_V)
                    column_ok = columns < V
                    of_token = (token * num_heads + head) * V + columns
                    v_t = tl.load(v + of_token, mask=column_ok, other=0.0).to(wide)
                    x = k_t.to(wide)[:, None] * v_t[None, :]
                    before = states + t * size
                    x = _product(x, before, weight, columns, V, BLOCK_C, False, dtype)
                    z = tanh(x, APPROXIMATE)
                    here = column_ok[None, :]
                    h = tl.load(running + columns[None, :], mask=here, other=0.0)
                    h = z + f_t * (h - z)
                    tl.store(tanhs + t * size + columns[None, :], z, mask=here)
                    tl.store(running + columns[None, :], h, mask=here)
                    tl.store(before + size + columns[None, :], h.to(dtype), mask=here)
                tl.debug_barrier()

            for reverse in range(0, count):
                t = count - 1 - reverse
                token = first_token + t
                q_t = tl.load(q + (token * q_heads + q_head) * K + rows, mask=row_ok, other=0.0)
                k_t = tl.load(k + (token * k_heads + k_head) * K + rows, mask=row_ok, other=0.0)
                f_t = tl.load(forget + token * num_heads + head).to(wide)
                q_t, k_t = q_t.to(wide), k_t.to(wide)
                dq_t, dk_t, df_t = q_t * 0.0, q_t * 0.0, q_t * 0.0
                for first in range(0, V, BLOCK_V):
                    columns = first + tl.arange(0, BLOCK_V)
                    column_ok = columns < V
                    here = column_ok[None, :]
                    ok = row_ok[:, None] & here
                    of_token = (token * num_heads + head) * V + columns
                    v_t = tl.load(v + of_token, mask=column_ok, other=0.0).to(wide)
                    dy_t = tl.load(dy + of_token, mask=column_ok, other=0.0).to(wide)
                    dh = tl.load(gradient + columns[None, :], mask=ok, other=0.0)
                    if CLIP:
                        dh = tl.clamp(dh, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
                    d = dh + q_t[:, None] * dy_t[None, :]
                    in_states = states + t * size + columns[None, :]
                    before = tl.load(in_states, mask=here, other=0.0).to(wide)
                    after = tl.load(in_states + size, mask=here, other=0.0).to(wide)
                    z = tl.load(tanhs + t * size + columns[None, :], mask=here, other=0.0)
                    dx = d * ((1.0 - f_t) * (1.0 - z * z))
                    tl.store(dxs + t * size + columns[None, :], dx.to(dtype), mask=here)
                    tl.store(gradient + columns[None, :], f_t * d, mask=ok)
                    dq_t += tl.sum(after * dy_t[None, :], 1)
                    dk_t += tl.sum(dx * v_t[None, :], 1)
                    df_t += tl.sum(d * (before - z), 1)
                    dv_t = tl.sum(dx * k_t[:, None], 0).to(dv.dtype.element_ty)
                    place = ((parts_of_v + row + t) * num_heads + head) * V
                    tl.store(dv + place + columns, dv_t, mask=column_ok)
                place = ((row + t) * num_heads + head) * K
                tl.store(dq + place + rows, dq_t.to(dq.dtype.element_ty), mask=row_ok)
                tl.store(dk + place + rows, dk_t.to(dk.dtype.element_ty), mask=row_ok)
                place = (part * tl.cast(total, tl.int64) + token) * num_heads + head
                tl.store(df + place, tl.sum(df_t, 0))
                tl.debug_barrier()
                for first in range(0, V, BLOCK_V):
                    columns = first + tl.arange(0, BLOCK_V)
                    ok = row_ok[:, None] & (columns < V)[None, :]
                    dh = tl.load(gradient + columns[None, :], mask=ok, other=0.0)
                    dx_rows = dxs + t * size
                    dh = _product(dh, dx_rows, weight, columns, V, BLOCK_C, True, dtype)
                    tl.store(gradient + columns[None, :], dh, mask=ok)
                tl.debug_barrier()

            # The rows of all tokens of the chunk lie one after the other.
            for from_first in range(0, V, BLOCK_C):
                origin = from_first + tl.arange(0, BLOCK_C)
                for first in range(0, V, BLOCK_V):
                    columns = first + tl.arange(0, BLOCK_V)
                    column_ok = (columns < V)[None, :]
                    square = dw + origin[:, None] * V + columns[None, :]
                    ok = (origin < V)[:, None] & column_ok
                    d_weight = tl.load(square, mask=ok, other=0.0)
                    for t in range(0, count):
                        before = tl.load(
                            states + t * size + origin[None, :],
                            mask=(origin < V)[None, :],
                            other=0.0,
                        )
                        dx = tl.load(dxs + t * size + columns[None, :], mask=column_ok, other=0.0)
                        d_weight += tl.dot(
                            tl.trans(before), dx, input_precision="ieee", out_dtype=wide
                        )
                    tl.store(square, d_weight, mask=ok)
            tl.debug_barrier()  # the next chunk's states take the place of this one's


KERNELS = (_forward_kernel, _backward_kernel)
