"""The kernels of M2RNN as one differentiable function: launches, sizes and costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences, without_waiting
from pretrain.ops.m2rnn import step_kernels, wide_kernels
from pretrain.ops.shared.launching import approximate, launch, power_of_two, schedulers
from pretrain.ops.shared.planning import Work

CHUNK = 64  # tokens between stored states, unless asked otherwise
PIECE = 4  # most tokens of a chunk whose inner values are in registers at once
DW_SLOTS = 256  # most parts that the gradient of W is left in: programs may share sequences
SEGMENTS = 8  # of a sequence's time whose gradients exist for every head at once
PROGRAMS = 4096  # about as many as may run at once: more would only need more scratch
WIDE_PROGRAMS = 264  # of wide heads, which need a scratch of a chunk's states each
# Value channels of a head whose W fits a multiprocessor, by the bytes of a number.
WIDEST_ON_CHIP = {2: 128, 4: 64, 8: 32}

# Instructions of a warp for a token by rows of its block (benchmarks/kernels_compiled.py, K = 64,
# V = 16), without a branch that runs once in 64 tokens; and cycles in which it waits besides.
INSTRUCTIONS = {False: {16: 140, 32: 201, 64: 305}, True: {16: 411, 32: 688}}
WAITS = {False: 150, True: 600}


def blocks(key_dim: int, value_dim: int, heads: int, schedulers: int, *, backward: bool) -> Any:
    """Return rows and columns of a program's state, its warps, and (backward) tokens of a piece.

    ``heads``: those of all sequences, which run side by side; ``schedulers``: of the device's
    warps. A warp holds up to 1024 numbers of the state forward, 32 in each thread, so that the sums
    over rows need no other warp, and half as many or fewer where so few programs would leave
    schedulers idle. Backward the states and tanhs of a piece's tokens stay in registers as well:
    512 numbers at V = 16, where one warp has all columns, and 256 beyond. There 168 registers let
    12 warps, not 8, share a multiprocessor. What is spilled is in
    benchmarks/results/kernels_compiled.txt.
    """
    block_v = max(16, power_of_two(value_dim))
    warps = min(8, block_v // 16)
    most = (32 if block_v == 16 else 16) if backward else 64
    sizes = [size for size in INSTRUCTIONS[backward] if size <= most and size < 2 * key_dim] or [16]

    def cycles(size: int) -> float:
        """Return the cycles that a token takes."""
        instructions = INSTRUCTIONS[backward][size]
        programs = heads * triton.cdiv(key_dim, size)
        turns = triton.cdiv(programs * warps, schedulers)
        return max(turns * instructions, instructions + WAITS[backward])

    # Smaller blocks leave y, dv and df in more parts: they must be worth it.
    bound = 1.1 * min(map(cycles, sizes))
    # Pipelined loads go through shared memory, which costs more instructions than it hides.
    found = {
        "BLOCK_K": max(size for size in sizes if cycles(size) <= bound),
        "BLOCK_V": block_v,
        "num_warps": warps,
        "num_stages": 1,
    }
    if not backward:
        return found
    registers = {"maxnreg": 168} if block_v == 16 else {}
    return found | registers | {"PIECE": PIECE if 16 < block_v <= 64 else PIECE // 2}


def is_wide(v: Tensor) -> bool:
    """Return whether W is too wide for a multiprocessor."""
    return v.shape[-1] > WIDEST_ON_CHIP[v.element_size()]


def wide_blocks() -> dict[str, int]:
    """Return the rows of a wide head's program, its tiles of columns, and its warps."""
    return {"BLOCK_K": 16, "BLOCK_V": 128, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1}


class M2RNN(torch.autograd.Function):
    """The kernels as one differentiable function.

    q, k ``[T, Hx, K]``, v ``[T, H, V]``, weight ``[H, V, V]``, forget ``[T, H]``, initial_state
    ``[N, H, K, V]`` to y ``[T, H, V]`` in v's dtype and the final states; ``save``: whether there
    will be a backward pass.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        weight: Tensor,
        forget: Tensor,
        initial_state: Tensor,
        sequences: Sequences,
        clip: float | None,
        chunk: int,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, weight, forget = (x.contiguous() for x in (q, k, v, weight, forget))
        initial_state = initial_state.contiguous()
        (total, num_heads, value_dim), key_dim = v.shape, q.shape[-1]
        num_sequences = sequences.count
        heads = num_sequences * num_heads
        sizes = blocks(key_dim, value_dim, heads, schedulers(v.device), backward=False)
        kernel: Any = step_kernels.KERNELS[0]
        if is_wide(v):
            kernel, sizes = wide_kernels.KERNELS[0], wide_blocks()
        parts = triton.cdiv(key_dim, sizes["BLOCK_K"])
        scratch = {}
        if is_wide(v):
            scratch["narrow"] = q.new_empty(heads * parts, 2, sizes["BLOCK_K"], value_dim)
        wide = initial_state.dtype
        y = torch.empty(parts, *v.shape, dtype=v.dtype if parts == 1 else wide, device=v.device)
        final = torch.empty_like(initial_state)
        chunk_starts = sequences.derive(_chunk_starts, chunk)
        # A bound that needs no look at the lengths: every sequence may end in a part of a chunk.
        num_chunks = total // chunk + num_sequences if save else 0
        checkpoints = initial_state.new_empty(num_chunks, num_heads, key_dim, value_dim)
        launch(
            kernel,
            (num_sequences, num_heads, parts),
            _work(v, key_dim, sequences, backward=False),
            q,
            k,
            v,
            weight,
            forget,
            initial_state,
            y,
            final,
            checkpoints,
            sequences.cu_seqlens,
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
            **scratch,
            **sizes,
        )
        like = initial_state.new_empty(0)  # a view would keep the states
        ctx.save_for_backward(q, k, v, weight, forget, checkpoints, like)
        ctx.sequences = sequences
        ctx.clip, ctx.chunk, ctx.num_sequences = clip, chunk, num_sequences
        return y[0] if parts == 1 else y.sum(0).to(v.dtype), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, dy: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, weight, forget, checkpoints, like = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        chunk_starts = sequences.derive(_chunk_starts, ctx.chunk)
        (total, num_heads, value_dim), key_dim = v.shape, q.shape[-1]
        heads = ctx.num_sequences * num_heads
        sizes = blocks(key_dim, value_dim, heads, schedulers(v.device), backward=True)
        kernel: Any = step_kernels.KERNELS[1]
        if is_wide(v):
            kernel, sizes = wide_kernels.KERNELS[1], wide_blocks()
        parts, wide = triton.cdiv(key_dim, sizes["BLOCK_K"]), like.dtype
        programs = WIDE_PROGRAMS if is_wide(v) else PROGRAMS
        slots = max(1, min(ctx.num_sequences, DW_SLOTS, programs // (num_heads * parts) + 1))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        df = like.new_empty(parts, *forget.shape)
        dw = like.new_zeros(parts * slots, *weight.shape)
        d_initial = like.new_empty(ctx.num_sequences, num_heads, key_dim, value_dim)
        block = (slots * num_heads * parts, sizes["BLOCK_K"])
        scratch = {}
        if is_wide(v):
            starts = q.new_empty(block[0], ctx.chunk + 1, block[1], value_dim)
            scratch["tanhs"] = like.new_empty(block[0], ctx.chunk, block[1], value_dim)
            scratch["dxs"] = q.new_empty(block[0], ctx.chunk, block[1], value_dim)
            scratch["running"] = like.new_empty(*block, value_dim)
        else:
            starts = q.new_empty(*block, sizes["BLOCK_V"], ctx.chunk // sizes["PIECE"])
        dy, d_after = dy.contiguous(), d_final.contiguous()
        full_work = _work(v, key_dim, sequences, backward=True).share(1 / max(total, 1))
        for segment in sequences.derive(_segments, ctx.chunk, SEGMENTS):
            # One gradient for every head and part, added up before the next segment has its own.
            own_dq, own_dk = (
                torch.empty(segment.total, num_heads, key_dim, dtype=x.dtype, device=x.device)
                for x in (q, k)
            )
            own_dv = like.new_empty(
                parts, segment.total, *v.shape[1:], dtype=v.dtype if parts == 1 else wide
            )
            launch(
                kernel,
                (slots, num_heads, parts),
                full_work.share(segment.total),
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
                sequences.cu_seqlens,
                chunk_starts,
                segment.first_rows,
                total,
                segment.total,
                ctx.num_sequences,
                segment.done,
                segment.most,
                ctx.clip or 0.0,
                num_heads,
                q.shape[1],
                k.shape[1],
                K=key_dim,
                V=value_dim,
                CHUNK=ctx.chunk,
                CLIP=ctx.clip is not None,
                APPROXIMATE=approximate(q.dtype),
                **scratch,
                **sizes,
            )
            d_after = d_initial
            for target, found in (
                (dq, _shared(own_dq, q)),
                (dk, _shared(own_dk, k)),
                (dv, _added(own_dv, v)),
            ):
                target.index_copy_(0, segment.tokens.to(target.device), found)
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


def _work(v: Tensor, key_dim: int, sequences: Sequences, *, backward: bool) -> Work:
    """Return the work by what the kernels compile to at K = 64, V = 16, in their usual blocks."""
    numbers, value_dim = v.numel() * key_dim, v.shape[-1]
    # Backward two products with W's transpose and for its gradient, and nearly two to have states.
    flops = numbers * (8 * value_dim + 4 if backward else 2 * value_dim + 2)
    rows, of_token = max(INSTRUCTIONS[backward].items())
    cycles = of_token + WAITS[backward]
    if is_wide(v):  # W comes from the L2 cache, 64 bytes a cycle, once forward and twice backward
        cycles += value_dim**2 * v.element_size() / 64 * (2 if backward else 1)
    return Work(flops, numbers * of_token / (16 * rows), sequences.max_length * cycles)


@dataclass(frozen=True)
class _Segment:
    """The segment of every sequence that one launch of the backward kernel processes.

    Attributes:
        done: chunks at each sequence's end that earlier launches have processed.
        most: the most chunks of a sequence that this one processes, before those.
        total: rows of the segment's gradients.
        tokens: ``[total]`` token that each row belongs to.
        first_rows: ``[N]`` first row of each sequence.
    """

    done: int
    most: int
    total: int
    tokens: Tensor
    first_rows: Tensor


def _segments(sequences: Sequences, chunk: int, count: int) -> list[_Segment]:
    """Cut the longest sequence into about ``count`` segments, others with it, the last first."""
    lengths = sequences.lengths
    chunks = [-(-length // chunk) for length in lengths]
    most = max(-(-max(chunks, default=0) // count), 1)
    starts = sequences.on_host[:-1].tolist()
    found = []
    for done in range(0, max(chunks, default=1) or 1, most):
        tokens, first_rows, total = [], [], 0
        for start, length, number in zip(starts, lengths, chunks, strict=True):
            first = max(number - done - most, 0) * chunk
            last = min(max(number - done, 0) * chunk, length)
            tokens.append(torch.arange(start + first, start + max(first, last)))
            first_rows.append(total)
            total += len(tokens[-1])
        rows, device = torch.cat(tokens or [torch.arange(0)]), sequences.device
        at = torch.tensor(first_rows, dtype=torch.int64)
        found.append(
            _Segment(done, most, total, without_waiting(rows, device), without_waiting(at, device))
        )
    return found


def _chunk_starts(sequences: Sequences, chunk: int) -> Tensor:
    """Count the chunks of the sequences before each one, ``[N]``."""
    counts = (sequences.sizes + (chunk - 1)) // chunk
    return counts.cumsum(0) - counts


def _added(parts: Tensor, like: Tensor) -> Tensor:
    return (parts[0] if len(parts) == 1 else parts.sum(0)).to(like.dtype)


def _shared(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum ``[T, H, K]`` over the heads that share one of ``like``'s, in float32 or wider."""
    if gradient.shape[1] == like.shape[1]:
        return gradient
    wide = torch.promote_types(gradient.dtype, torch.float32)
    return gradient.unflatten(1, (like.shape[1], -1)).sum(2, dtype=wide).to(like.dtype)
