"""M2RNN's recurrence (:mod:`pretrain.ops.m2rnn`) with its state on chip, forward and backward.

Rows of the state (key channels) never meet but in the read, so a program takes some rows of one
head of one sequence and walks through time with them in registers: a product with W in the tensor
cores, tanh, and the mix. What is summed over rows (y, dv, df, dW) is left in parts by programs that
share a head and added afterwards, in a fixed order.

The forward pass stores the state before every ``chunk``-th token, in float32. Backward walks from
chunk to chunk to the front. Within a chunk it runs forward once, leaving the state before every
short piece in a scratch of some tens of megabytes, meant to stay in the L2 cache (in the inputs'
dtype, which is what W multiplies anyway); then it takes the pieces from the last to the first:
forward once more with every state and tanh in registers, then back. It is launched for one stretch
of the sequences' time after another, so that gradients that every head and part has of its own, to
be added up, take a fraction of the memory.

Its bound is not memory but the instructions issued, then tanh (K V for each token and head forward,
less than 2 K V backward; 16 per clock and multiprocessor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pretrain.data.sequences import (
    cu_seqlens_on_host,
    max_length,
    remember,
    sequence_lengths,
    without_waiting,
)
from pretrain.ops.shared.arguments import Work
from pretrain.ops.shared.elementary_kernels import tanh
from pretrain.ops.shared.launching import approximate, launch, power_of_two

CHUNK = 64  # tokens between stored states, unless asked otherwise
PIECE = 4  # tokens of a chunk whose inner values are in registers at once
DW_SLOTS = 256  # most parts that the gradient of W is left in: programs may share sequences
STRETCHES = 8  # of a sequence's time whose gradients exist for every head at once
PROGRAMS = 4096  # about as many as may run at once: more would only need more scratch


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
                place = checkpoints + ((chunk + t // CHUNK) * num_heads + head) * K * V
                tl.store(place + in_state, h, mask=state_ok)
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


@triton.jit(do_not_specialize=["own_total", "done", "most"])
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
    places,
    total,
    own_total,
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
        # Gradients that are left in parts lie at rows of this launch's own.
        place_of_start = tl.load(places + sequence) - (num_chunks - until) * CHUNK
        for back in range(done, until):
            c = num_chunks - 1 - back
            own = place_of_start + c * CHUNK
            first = start + c * CHUNK
            count = length - c * CHUNK  # tokens from here on
            place = checkpoints + ((chunk + c) * num_heads + head) * K * V
            h = tl.load(place + in_state, mask=state_ok, other=0.0)
            k_c = k + (first * k_heads + k_head) * K + rows
            v_c = v + (first * num_heads + head) * V + columns
            f_c = forget + first * num_heads + head
            q_c = q + (first * q_heads + q_head) * K + rows
            dy_c = dy + (first * num_heads + head) * V + columns
            dq_c = dq + (own * num_heads + head) * K + rows
            dk_c = dk + (own * num_heads + head) * K + rows
            dv_c = dv + ((part * own_total + own) * num_heads + head) * V + columns
            df_c = df + (part * total + first) * num_heads + head

            # Tokens behind the end have f = 1 and all else 0: they change nothing.
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
                    h = tl.load(place + in_state, mask=state_ok, other=0.0)
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
                    dq_t = tl.sum(states[i + 1].to(wide) * dy_t[None, :], 1)
                    dk_t = tl.sum(dx * v_t[None, :], 1)
                    dv_t = tl.sum(dx * k_t[:, None], 0)
                    df_t = tl.sum(tl.sum(d * (before.to(wide) - z), 1), 0)
                    tl.store(
                        dq_c + t * num_heads * K, dq_t.to(dq.dtype.element_ty), mask=row_ok & here
                    )
                    tl.store(
                        dk_c + t * num_heads * K, dk_t.to(dk.dtype.element_ty), mask=row_ok & here
                    )
                    tl.store(
                        dv_c + t * num_heads * V,
                        dv_t.to(dv.dtype.element_ty),
                        mask=column_ok & here,
                    )
                    tl.store(df_c + t * num_heads, df_t, mask=here)
            tl.debug_barrier()  # the next chunk's starts take the place of this one's
        tl.store(d_before + of_sequence + in_state, dh, mask=state_ok)
    tl.store(of_weight + in_weight, d_weight, mask=square_ok)


def blocks(key_dim: int, value_dim: int, *, backward: bool) -> dict[str, int]:
    """Rows and columns of a program's state, its warps, and (backward) tokens of a piece.

    A warp holds up to 1024 numbers of the state, 32 in each thread, so that the sums over rows need
    no other warp. Backward the states and tanhs of a piece's tokens stay in registers as well: 512
    numbers at V = 16, where one warp has all columns, and 256 beyond. What larger ones spill is in
    benchmarks/results/kernels_compiled.txt.
    """
    block_v = max(16, power_of_two(value_dim))
    most = (32 if block_v == 16 else 16) if backward else 64
    block_k = min(most, max(16, power_of_two(key_dim)))
    # Pipelined loads go through shared memory, which costs more instructions than it hides.
    found = {
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "num_warps": min(8, block_v // 16),
        "num_stages": 1,
    }
    return found | {"PIECE": PIECE} if backward else found


class M2RNN(torch.autograd.Function):
    """q, k ``[T, Hx, K]``, v ``[T, H, V]``, weight ``[H, V, V]``, forget ``[T, H]``, initial_state
    ``[N, H, K, V]`` to y ``[T, H, V]`` in v's dtype and the final states; ``save``: whether there
    will be a backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        forget: Tensor,
        initial_state: Tensor,
        cu_seqlens: Tensor,
        clip: float | None,
        chunk: int,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, weight, forget = (x.contiguous() for x in (q, k, v, weight, forget))
        initial_state = initial_state.contiguous()
        (total, num_heads, value_dim), key_dim = v.shape, q.shape[-1]
        num_sequences = len(cu_seqlens) - 1
        sizes = blocks(key_dim, value_dim, backward=False)
        parts = triton.cdiv(key_dim, sizes["BLOCK_K"])
        wide = initial_state.dtype
        y = torch.empty(parts, *v.shape, dtype=v.dtype if parts == 1 else wide, device=v.device)
        final = torch.empty_like(initial_state)
        chunk_starts = _chunk_starts(cu_seqlens, chunk)
        # A bound that needs no look at the lengths: every sequence may end in a part of a chunk.
        num_chunks = total // chunk + num_sequences if save else 0
        checkpoints = initial_state.new_empty(num_chunks, num_heads, key_dim, value_dim)
        launch(
            _forward_kernel,
            (num_sequences, num_heads, parts),
            _work(v, key_dim, cu_seqlens, backward=False),
            q,
            k,
            v,
            weight,
            forget,
            initial_state,
            y,
            final,
            checkpoints,
            cu_seqlens,
            chunk_starts,
            total,
            num_heads,
            q.shape[1],
            k.shape[1],
            K=key_dim,
            V=value_dim,
            CHUNK=chunk,
            SAVE=save,
            APPROXIMATE=approximate(q.dtype),
            **sizes,
        )
        ctx.save_for_backward(q, k, v, weight, forget, checkpoints, chunk_starts, initial_state[:0])
        # Not a saved tensor: activation checkpointing would hand back another object, of which
        # nothing is remembered.
        ctx.cu_seqlens = cu_seqlens
        ctx.clip, ctx.chunk, ctx.num_sequences = clip, chunk, num_sequences
        return y[0] if parts == 1 else y.sum(0).to(v.dtype), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight, forget, checkpoints, chunk_starts, like = ctx.saved_tensors
        cu_seqlens = ctx.cu_seqlens
        (total, num_heads, value_dim), key_dim = v.shape, q.shape[-1]
        sizes = blocks(key_dim, value_dim, backward=True)
        parts, wide = triton.cdiv(key_dim, sizes["BLOCK_K"]), like.dtype
        slots = max(1, min(ctx.num_sequences, DW_SLOTS, PROGRAMS // (num_heads * parts) + 1))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        df = like.new_empty(parts, *forget.shape)
        dw = like.new_empty(parts * slots, *weight.shape)
        d_initial = like.new_empty(ctx.num_sequences, num_heads, key_dim, value_dim)
        starts = q.new_empty(
            slots
            * num_heads
            * parts
            * (ctx.chunk // sizes["PIECE"])
            * sizes["BLOCK_K"]
            * sizes["BLOCK_V"]
        )
        dy, d_after = dy.contiguous(), d_final.contiguous()
        whole = _work(v, key_dim, cu_seqlens, backward=True).share(1 / max(total, 1))
        for stretch in _stretches(cu_seqlens, ctx.chunk, STRETCHES):
            # One gradient for every head and part, added up before the next stretch has its own.
            own_dq, own_dk = (
                torch.empty(stretch.total, num_heads, key_dim, dtype=x.dtype, device=x.device)
                for x in (q, k)
            )
            own_dv = like.new_empty(
                parts, stretch.total, *v.shape[1:], dtype=v.dtype if parts == 1 else wide
            )
            launch(
                _backward_kernel,
                (slots, num_heads, parts),
                whole.share(stretch.total),
                q,
                k,
                v,
                weight,
                forget,
                checkpoints,
                dy,
                d_after,
                own_dq,
                own_dk,
                own_dv,
                df,
                dw,
                d_initial,
                starts,
                cu_seqlens,
                chunk_starts,
                stretch.places,
                total,
                stretch.total,
                ctx.num_sequences,
                stretch.done,
                stretch.most,
                ctx.clip or 0.0,
                num_heads,
                q.shape[1],
                k.shape[1],
                K=key_dim,
                V=value_dim,
                CHUNK=ctx.chunk,
                CLIP=ctx.clip is not None,
                APPROXIMATE=approximate(q.dtype),
                **sizes,
            )
            d_after = d_initial
            for target, found in (
                (dq, _shared(own_dq, q)),
                (dk, _shared(own_dk, k)),
                (dv, _added(own_dv, v)),
            ):
                target.index_copy_(0, stretch.tokens.to(target.device), found)
        return (
            dq,
            dk,
            dv,
            dw.sum(0).to(weight.dtype),
            _added(df, forget),
            d_initial,
            None,
            None,
            None,
            None,
        )


def _work(v: Tensor, key_dim: int, cu_seqlens: Tensor, *, backward: bool) -> Work:
    """By what the kernels compile to at K = 64, V = 16 (benchmarks/kernels_compiled.py): some 640
    instructions of a warp for a token's 1024 numbers forward; backward 790 for each 512."""
    numbers, value_dim = v.numel() * key_dim, v.shape[-1]
    # Backward two products with W's transpose and for its gradient, and nearly two to have states.
    flops = numbers * (8 * value_dim + 4 if backward else 2 * value_dim + 2)
    instructions = numbers * (790 / 512 if backward else 640 / 1024)
    return Work(flops, instructions, max_length(cu_seqlens) * (1500 if backward else 450))


@dataclass(frozen=True)
class _Stretch:
    """What one launch of the backward kernel works off of every sequence: at the most ``most``
    chunks before its last ``done``. ``tokens`` ``[total]``: where the rows of its gradients belong;
    ``places`` ``[N]``: the first row of each sequence."""

    done: int
    most: int
    total: int
    tokens: Tensor
    places: Tensor


@remember
def _stretches(cu_seqlens: Tensor, chunk: int, count: int) -> list[_Stretch]:
    """About ``count`` of the longest sequence, the last first."""
    lengths = sequence_lengths(cu_seqlens)
    chunks = [-(-length // chunk) for length in lengths]
    most = max(-(-max(chunks, default=0) // count), 1)
    starts = cu_seqlens_on_host(cu_seqlens)[:-1].tolist()
    found = []
    for done in range(0, max(chunks, default=1) or 1, most):
        tokens, places, total = [], [], 0
        for start, length, number in zip(starts, lengths, chunks, strict=True):
            first = max(number - done - most, 0) * chunk
            last = min(max(number - done, 0) * chunk, length)
            tokens.append(torch.arange(start + first, start + max(first, last)))
            places.append(total)
            total += len(tokens[-1])
        rows, device = torch.cat(tokens or [torch.arange(0)]), cu_seqlens.device
        at = torch.tensor(places, dtype=torch.int64)
        found.append(
            _Stretch(done, most, total, without_waiting(rows, device), without_waiting(at, device))
        )
    return found


def _chunk_starts(cu_seqlens: Tensor, chunk: int) -> Tensor:
    """``[N]``: chunks of the sequences before each one."""
    counts = (cu_seqlens.diff() + (chunk - 1)) // chunk
    return counts.cumsum(0) - counts


def _added(parts: Tensor, like: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(like.dtype)


def _shared(gradient: Tensor, like: Tensor) -> Tensor:
    """``[T, H, K]`` summed over the heads that share one of ``like``'s, in float32 or wider."""
    if gradient.shape[1] == like.shape[1]:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2, dtype=wide).to(like.dtype)
