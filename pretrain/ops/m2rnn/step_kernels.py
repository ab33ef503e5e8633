"""M2RNN's recurrence (:mod:`pretrain.ops.m2rnn`) with its state on chip, forward and backward.

Rows of the state (key channels) never meet but in the read, so a program takes some rows of one
head of one sequence and walks through time with them in registers: a product with W in the tensor
cores, tanh, and the mix. What is summed over rows (y, dv, df, dW) is left in parts by programs that
share a head and added afterwards, in a fixed order.

The forward pass stores the state before every ``chunk``-th token, in float32. Backward walks from
chunk to chunk to the front. Within a chunk it runs forward once, leaving the state before every
short piece in a scratch of some tens of megabytes, meant to stay in the L2 cache (in the inputs'
dtype, which is what W multiplies anyway); then it takes the pieces from the last to the first:
forward once more with every state and tanh in registers, then back. It is launched for one segment
of the sequences' time after another, so that gradients that every head and part has of its own, to
be added up, take a fraction of the memory.

Its bound is not memory but the instructions issued, then tanh (K V for each token and head forward,
less than 2 K V backward; 16 per clock and multiprocessor).
"""

from __future__ import annotations

import triton
import triton.language as tl

from pretrain.ops.shared.elementary_kernels import tanh


@triton.jit
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
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    SAVE: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    sequence, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = part * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    row_ok = (rows < K) | (K % BLOCK_K == 0)
    column_ok = (columns < V) | (V == BLOCK_V)
    square_ok = column_ok[:, None] & column_ok[None, :]
    state_ok = row_ok[:, None] & column_ok[None, :]
    start = tl.load(cu_seqlens + sequence).to(tl.int64)
    length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
    chunk = tl.load(chunk_starts + sequence).to(tl.int64)

    dtype = q.dtype.element_ty
    w = tl.load(
        weight + (head * V + columns[:, None]) * V + columns[None, :], mask=square_ok, other=0.0
    ).to(dtype)
    in_state = rows[:, None] * V + columns[None, :]
    of_sequence = (sequence.to(tl.int64) * num_heads + head) * K * V
    h = tl.load(initial + of_sequence + in_state, mask=state_ok, other=0.0)

    q_head, k_head = head // (num_heads // q_heads), head // (num_heads // k_heads)
    q += (start * q_heads + q_head) * K + rows
    k += (start * k_heads + k_head) * K + rows
    v += (start * num_heads + head) * V + columns
    forget += start * num_heads + head
    y += ((part * total + start) * num_heads + head) * V + columns
    any_token = length > 0
    next_q = tl.load(q, mask=row_ok & any_token, other=0.0)
    next_k = tl.load(k, mask=row_ok & any_token, other=0.0)
    next_v = tl.load(v, mask=column_ok & any_token, other=0.0)
    next_f = tl.load(forget, mask=any_token, other=0.0)
    for t in range(0, length):
        if SAVE:
            if t % CHUNK == 0:
                address = checkpoints + ((chunk + t // CHUNK) * num_heads + head) * K * V
                tl.store(address + in_state, h, mask=state_ok)
        q_t, k_t, v_t = next_q.to(h.dtype), next_k.to(h.dtype), next_v.to(h.dtype)
        f_t = next_f.to(h.dtype)
        # The next token's values are on their way while this one's are used.
        q += q_heads * K
        k += k_heads * K
        v += num_heads * V
        forget += num_heads
        more = t + 1 < length
        next_q = tl.load(q, mask=row_ok & more, other=0.0)
        next_k = tl.load(k, mask=row_ok & more, other=0.0)
        next_v = tl.load(v, mask=column_ok & more, other=0.0)
        next_f = tl.load(forget, mask=more, other=0.0)

        x = tl.dot(h.to(dtype), w, input_precision="ieee", out_dtype=h.dtype)
        z = tanh(x + k_t[:, None] * v_t[None, :], APPROXIMATE)
        h = z + f_t * (h - z)
        read = tl.sum(q_t[:, None] * h, 0)
        tl.store(y, read.to(y.dtype.element_ty), mask=column_ok)
        y += num_heads * V
    tl.store(final + of_sequence + in_state, h, mask=state_ok)


@triton.jit
def _store_by_rows(target, matrix, vector, ok, dtype: tl.constexpr):
    """Store the product of ``matrix`` and ``vector`` (in a wide type) at ``target``."""
    if matrix.shape[1] == 16:
        # A tile of the tensor cores, all of whose columns are the same.
        columns = tl.arange(0, 8)
        tile = tl.broadcast_to(vector.to(dtype)[:, None], 16, 8)
        found = tl.dot(matrix.to(dtype), tile, input_precision="ieee", out_dtype=vector.dtype)
        there = ok[:, None] & (columns == 0)[None, :]
        tl.store(target[:, None] + 0 * columns, found.to(target.dtype.element_ty), mask=there)
    else:
        found = tl.sum(matrix.to(vector.dtype) * vector[None, :], 1)
        tl.store(target, found.to(target.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["num_sequences", "segment_total", "done", "most"])
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
    starts,
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
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    CLIP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    slot, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = part * BLOCK_K + tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_V)
    row_ok = (rows < K) | (K % BLOCK_K == 0)
    column_ok = (columns < V) | (V == BLOCK_V)
    square_ok = column_ok[:, None] & column_ok[None, :]
    state_ok = row_ok[:, None] & column_ok[None, :]
    dtype = q.dtype.element_ty
    wide = d_after.dtype.element_ty
    in_weight = columns[:, None] * V + columns[None, :]
    w = tl.load(weight + head * V * V + in_weight, mask=square_ok, other=0.0).to(dtype)
    w_back = tl.trans(w)
    in_state = rows[:, None] * V + columns[None, :]
    q_head, k_head = head // (num_heads // q_heads), head // (num_heads // k_heads)
    in_block = tl.arange(0, BLOCK_K)[:, None] * BLOCK_V + columns[None, :]
    program = (slot.to(tl.int64) * num_heads + head) * tl.num_programs(2) + part
    starts += program * (CHUNK // PIECE * BLOCK_K * BLOCK_V)
    limit = tl.cast(clip, wide)
    of_weight = dw + ((part * tl.num_programs(0) + slot) * num_heads + head) * V * V
    d_weight = tl.load(of_weight + in_weight, mask=square_ok & (done > 0), other=0.0)

    for sequence in range(slot, num_sequences, tl.num_programs(0)):
        start = tl.load(cu_seqlens + sequence).to(tl.int64)
        length = tl.load(cu_seqlens + sequence + 1).to(tl.int64) - start
        chunk = tl.load(chunk_starts + sequence).to(tl.int64)
        of_sequence = (tl.cast(sequence, tl.int64) * num_heads + head) * K * V
        dh = tl.load(d_after + of_sequence + in_state, mask=state_ok, other=0.0)
        num_chunks = (length + CHUNK - 1) // CHUNK
        until = tl.minimum(num_chunks, done + most)
        # Partial gradients lie at rows that count this launch's tokens.
        place_of_start = tl.load(first_rows + sequence) - (num_chunks - until) * CHUNK
        for back in range(done, until):
            c = num_chunks - 1 - back
            row = place_of_start + c * CHUNK
            first = start + c * CHUNK
            count = length - c * CHUNK  # tokens from here on
            address = checkpoints + ((chunk + c) * num_heads + head) * K * V
            h = tl.load(address + in_state, mask=state_ok, other=0.0)
            k_c = k + (first * k_heads + k_head) * K + rows
            v_c = v + (first * num_heads + head) * V + columns
            f_c = forget + first * num_heads + head
            q_c = q + (first * q_heads + q_head) * K + rows
            dy_c = dy + (first * num_heads + head) * V + columns
            dq_c = dq + (row * num_heads + head) * K + rows
            dk_c = dk + (row * num_heads + head) * K + rows
            dv_c = dv + ((part * segment_total + row) * num_heads + head) * V + columns
            df_c = df + (part * total + first) * num_heads + head

            # Tokens after the end have f = 1 and all else 0: they change nothing.
            num_pieces = (tl.minimum(count, CHUNK) + PIECE - 1) // PIECE
            for t in range(0, (num_pieces - 1) * PIECE):
                k_t = tl.load(k_c + t * k_heads * K, mask=row_ok, other=0.0).to(wide)
                v_t = tl.load(v_c + t * num_heads * V, mask=column_ok, other=0.0).to(wide)
                f_t = tl.load(f_c + t * num_heads).to(wide)
                x = tl.dot(h.to(dtype), w, input_precision="ieee", out_dtype=wide)
                z = tanh(x + k_t[:, None] * v_t[None, :], APPROXIMATE)
                h = z + f_t * (h - z)
                if (t + 1) % PIECE == 0:
                    place_h = starts + (t + 1) // PIECE * (BLOCK_K * BLOCK_V)
                    tl.store(place_h + in_block, h.to(dtype))
            tl.debug_barrier()

            for reverse in range(0, num_pieces):
                piece = num_pieces - 1 - reverse
                if piece == 0:
                    h = tl.load(address + in_state, mask=state_ok, other=0.0)
                else:
                    h = tl.load(starts + piece * (BLOCK_K * BLOCK_V) + in_block).to(wide)
                states = (h.to(dtype),)
                inner = ()
                for i in tl.static_range(PIECE):
                    t = piece * PIECE + i
                    here = t < count
                    k_t = tl.load(k_c + t * k_heads * K, mask=row_ok & here, other=0.0)
                    v_t = tl.load(v_c + t * num_heads * V, mask=column_ok & here, other=0.0)
                    f_t = tl.load(f_c + t * num_heads, mask=here, other=1.0).to(wide)
                    x = tl.dot(states[i], w, input_precision="ieee", out_dtype=wide)
                    z = tanh(x + k_t.to(wide)[:, None] * v_t.to(wide)[None, :], APPROXIMATE)
                    h = z + f_t * (h - z)
                    states = states + (h.to(dtype),)
                    inner = inner + (z,)

                for i in tl.static_range(PIECE - 1, -1, -1):
                    t = piece * PIECE + i
                    here = t < count
                    q_t = tl.load(q_c + t * q_heads * K, mask=row_ok & here, other=0.0).to(wide)
                    k_t = tl.load(k_c + t * k_heads * K, mask=row_ok & here, other=0.0).to(wide)
                    v_t = tl.load(v_c + t * num_heads * V, mask=column_ok & here, other=0.0)
                    f_t = tl.load(f_c + t * num_heads, mask=here, other=1.0).to(wide)
                    dy_t = tl.load(dy_c + t * num_heads * V, mask=column_ok & here, other=0.0)
                    v_t, dy_t = v_t.to(wide), dy_t.to(wide)
                    if CLIP:
                        dh = tl.clamp(dh, -limit, limit, propagate_nan=tl.PropagateNan.ALL)
                    d = dh + q_t[:, None] * dy_t[None, :]
                    z, before = inner[i], states[i]
                    dx = d * ((1.0 - f_t) * (1.0 - z * z))
                    dx_narrow = dx.to(dtype)
                    dh = f_t * d + tl.dot(dx_narrow, w_back, input_precision="ieee", out_dtype=wide)
                    d_weight += tl.dot(
                        tl.trans(before), dx_narrow, input_precision="ieee", out_dtype=wide
                    )
                    _store_by_rows(
                        dq_c + t * num_heads * K, states[i + 1], dy_t, row_ok & here, dtype
                    )
                    _store_by_rows(dk_c + t * num_heads * K, dx, v_t, row_ok & here, dtype)
                    dv_t = tl.sum(dx * k_t[:, None], 0)
                    df_t = tl.sum(tl.sum(d * (before.to(wide) - z), 1), 0)
                    tl.store(
                        dv_c + t * num_heads * V,
                        dv_t.to(dv.dtype.element_ty),
                        mask=column_ok & here,
                    )
                    tl.store(df_c + t * num_heads, df_t, mask=here)
            tl.debug_barrier()  # the next chunk's starts take the place of this one's
        tl.store(d_before + of_sequence + in_state, dh, mask=state_ok)
    tl.store(of_weight + in_weight, d_weight, mask=square_ok)


KERNELS = (_forward_kernel, _backward_kernel)
