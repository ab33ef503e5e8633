"""M2RNN on a CPU by compiled loops, whose threads share out heads and sequences.

As the checkpointed form it keeps the state of every c-th step and computes the others again in the
backward pass, whose results do not depend on the number of threads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.m2rnn import cpu_kernels
from pretrain.ops.shared.threads import run_in_threads

HEAD_PARTS, SEQUENCE_PARTS = 8, 4  # at most; each has sums of its own
ROWS = 4  # that the loops take at a time: V is filled up with zeros to a multiple


class _Work(NamedTuple):
    """Hold what a pass is cut into.

    Attributes:
        heads: First and last + 1 of each part.
        sequences: Of each part ``[n, 4]``: number, first token, length and first block.
        slots: ``[2, H]``: where each head adds to the gradients of queries and of keys, which the
            heads of one part share.
        num_blocks: Blocks of all sequences.
        every: Steps in a block.
    """

    heads: list[NDArray[np.int64]]
    sequences: list[NDArray[np.int64]]
    slots: NDArray[np.int64]
    num_blocks: int
    every: int

    def tasks(self) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """Return the number of a part of sequences, those, and heads."""
        return [(i, s, h) for i, s in enumerate(self.sequences) for h in self.heads]


def compiled_m2rnn(
    rows: Sequence[Tensor],
    weight: Tensor,
    initial_state: Tensor,
    sequences: Sequences,
    state_grad_clip: float | None,
    checkpoint_every: int | None,
) -> tuple[Tensor, Tensor]:
    """Compute M2RNN; shapes are those of the definition, float32 or float64."""
    q, k, v, f = rows
    num_heads, width = v.shape[1:]
    states = initial_state.mT.contiguous()
    missing = -width % ROWS
    if missing:
        v = torch.nn.functional.pad(v, (0, missing))
        weight = torch.nn.functional.pad(weight, (0, missing, 0, missing))
        states = torch.nn.functional.pad(states, (0, 0, 0, missing))
    every = checkpoint_every or min(32, max(8, math.isqrt(sequences.max_length // 2)))
    work = sequences.derive(_work, num_heads, q.shape[1], k.shape[1], every)
    keep = torch.is_grad_enabled()
    clip = math.inf if state_grad_clip is None else state_grad_clip
    output, states = _CompiledM2RNN.apply(q, k, v, f, weight, states, work, clip, keep)
    return output[..., :width], states[..., :width, :].mT.contiguous()


class _CompiledM2RNN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        f: Tensor,
        weight: Tensor,
        states: Tensor,
        work: _Work,
        clip: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor]:
        q, k, v, f, weight = (x.contiguous() for x in (q, k, v, f, weight))
        states, output = states.clone(), torch.empty_like(v)
        starts = states.new_empty(work.num_blocks if keep else 0, *states.shape[1:])
        inputs = _arrays(q, k, v, f, weight)
        results = _arrays(starts, states, output)
        tasks = work.tasks()

        def run(i: int) -> None:
            _, some, heads = tasks[i]
            cpu_kernels.forward(*inputs, some, heads, work.every, *results)

        run_in_threads(run, len(tasks))
        ctx.save_for_backward(q, k, v, f, weight, starts)
        ctx.work, ctx.clip = work, clip
        return output, states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_output: Tensor, d_states: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, f, weight, starts = ctx.saved_tensors
        work: _Work = ctx.work
        slots = work.slots.max(1, initial=0) + 1
        dq, dk = (x.new_zeros(int(n), *x.shape) for n, x in zip(slots, (q, k), strict=True))
        dv, df, d_states = torch.empty_like(v), torch.empty_like(f), d_states.clone()
        d_weight = weight.new_zeros(max(len(work.sequences), 1), *weight.shape)
        inputs = _arrays(q, k, v, f, weight)
        kept, dy, *row_results, parts, state_results = _arrays(
            starts, d_output.contiguous(), dq, dk, dv, df, d_weight, d_states.contiguous()
        )
        clip, tasks = inputs[0].dtype.type(ctx.clip), work.tasks()

        def run(i: int) -> None:
            part, some, heads = tasks[i]
            cpu_kernels.backward(
                *inputs,
                *(some, heads, work.every, clip, kept, work.slots, dy),
                *row_results,
                parts[part],
                state_results,
            )

        run_in_threads(run, len(tasks))
        d_start = torch.from_numpy(state_results)
        return dq.sum(0), dk.sum(0), dv, df, d_weight.sum(0), d_start, None, None, None


def _arrays(*tensors: Tensor) -> list[NDArray[Any]]:
    return [x.detach().numpy() for x in tensors]


def _work(sequences: Sequences, num_heads: int, q_heads: int, k_heads: int, every: int) -> _Work:
    """Cut a pass into parts of about equal work."""
    bounds = np.linspace(0, num_heads, min(num_heads, HEAD_PARTS) + 1).astype(np.int64)
    part = np.searchsorted(bounds, np.arange(num_heads), side="right")
    slots = []
    for shared in (q_heads, k_heads):
        size = num_heads // shared
        slots.append(part - part[np.arange(num_heads) // size * size])
    lengths = sequences.lengths
    firsts = itertools.accumulate(lengths, initial=0)
    counts = [-(-n // every) for n in lengths]
    blocks = itertools.accumulate(counts, initial=0)
    columns = zip(range(len(lengths)), firsts, lengths, blocks, strict=False)  # sums have one more
    table = np.array(list(columns), np.int64).reshape(-1, 4)
    share = max(sum(lengths) / SEQUENCE_PARTS, 1)
    of_part = np.minimum(table[:, 1] // share, SEQUENCE_PARTS - 1)
    return _Work(
        [bounds[i : i + 2].copy() for i in range(len(bounds) - 1)],
        [table[of_part == i].copy() for i in np.unique(of_part)],
        np.array(slots, np.int64),
        sum(counts),
        every,
    )
