"""The kernels of ParaGRU and ParaLSTM as one differentiable function.

Here it is decided which forward kernel runs, and how large its tiles are.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.ops.para_rnn.gru_backward_kernel import gru_backward_kernel
from pretrain.ops.para_rnn.gru_forward_kernel import gru_forward_kernel
from pretrain.ops.para_rnn.lstm_backward_kernel import lstm_backward_kernel
from pretrain.ops.para_rnn.lstm_forward_kernel import lstm_forward_kernel
from pretrain.ops.para_rnn.parts import parts_of
from pretrain.ops.para_rnn.step_kernels import (
    AHEAD,
    CHANNELS,
    gru_steps_kernel,
    lstm_steps_kernel,
)
from pretrain.ops.shared.launching import SCHEDULERS, approximate, launch
from pretrain.ops.shared.planning import Work

STEPS = {"para_gru": gru_steps_kernel, "para_lstm": lstm_steps_kernel}
SHOOTING = {"para_gru": gru_forward_kernel, "para_lstm": lstm_forward_kernel}
BACKWARD = {"para_gru": gru_backward_kernel, "para_lstm": lstm_backward_kernel}
PROGRAMS = 264  # two for each multiprocessor of a large card
PASSES = 3  # of shooting over a tile, with usual gates; 4 where they remember for long


def segments(parts: int, dim: int) -> dict[str, int]:
    """Return a tile's segments S, their length L, its channels C, and its warps.

    A thread steps through one segment of one channel. 16 channels are one memory transaction of 32
    bytes; where that leaves too few programs to fill the card they have 8, and more segments.
    """
    if parts * triton.cdiv(dim, 16) >= PROGRAMS:
        return {"S": 16, "L": 32, "C": 16, "AHEAD": 4, "num_warps": 8, "num_stages": 1}
    return {"S": 64, "L": 32, "C": 8, "AHEAD": 4, "num_warps": 16, "num_stages": 1}


# Instructions of a warp for a token and channel, by what the kernels compile to
# (benchmarks/kernels_compiled.py); shooting with three passes.
INSTRUCTIONS = {
    ("para_gru", "steps"): 1.6,
    ("para_gru", "shooting"): 5.2,
    ("para_gru", "backward"): 5.0,
    ("para_lstm", "steps"): 2.3,
    ("para_lstm", "shooting"): 6.9,
    ("para_lstm", "backward"): 7.2,
}
# Cycles of what waits for each other: a step of a cell, one backward, the scan after a pass.
_STEP = {"para_gru": 150, "para_lstm": 160}
_STEP_BACK, _SCAN = 60, 600


def work(op: str, which: str, sequences: Sequences, dim: int) -> Work:
    """Return the work of ``op``'s kernel ``which``: "steps", "shooting" or "backward"."""
    parts = parts_of(sequences)
    sizes = segments(parts.count, dim)
    tiles = -(-parts.longest // (sizes["S"] * sizes["L"]))
    if which == "steps":
        cycles = sequences.max_length * _STEP[op]
    elif which == "shooting":
        cycles = tiles * PASSES * (sizes["L"] * _STEP[op] + _SCAN)
    else:
        cycles = tiles * (2 * sizes["L"] * _STEP_BACK + _SCAN)
    return Work(0.0, INSTRUCTIONS[op, which] * sequences.num_tokens * dim, cycles)


def steps_are_faster(op: str, sequences: Sequences, dim: int) -> bool:
    """Return whether plain steps take less time than shooting, by the instructions of both.

    Steps are a third of the work, but a chain as long as the longest sequence. With rows of equal
    length they win from about 15,000 channels of all sequences together on (of ParaLSTM 12,000).
    """
    stepping, shooting = (work(op, which, sequences, dim) for which in ("steps", "shooting"))
    return max(stepping.instructions / SCHEDULERS, stepping.cycles) < max(
        shooting.instructions / SCHEDULERS, shooting.cycles
    )


class ParaRNN(torch.autograd.Function):
    """The kernels as one differentiable function.

    u ``[T, 3, D]``, parameters ``[P, D]`` (recurrent weights, then biases), initial_state ``[N, S,
    D]`` to the output h ``[T, D]`` in u's dtype, the final states, the largest shift of a segment's
    start that was left and the most passes, for each part of the tokens and block of channels, and
    whether each sequence was stepped for want of convergence ``[N]``; all 0 where it is done in
    steps from the start (``stepwise``). ``kept`` is given the states of all steps ``[T, S, D]``.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        op: str,
        u: Tensor,
        parameters: Tensor,
        initial_state: Tensor,
        sequences: Sequences,
        iterations: int,
        tolerance: float,
        fallback: bool,
        stepwise: bool,
        kept: list[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        u, parameters, initial_state = (x.contiguous() for x in (u, parameters, initial_state))
        num_sequences, num_states, dim = initial_state.shape
        states = u.new_empty(len(u), num_states, dim)
        parts = parts_of(sequences)
        sizes = segments(parts.count, dim)
        grid = (parts.count, triton.cdiv(dim, sizes["C"]))
        residuals = torch.zeros(grid, dtype=initial_state.dtype, device=u.device)
        passes = torch.zeros(grid, dtype=torch.int32, device=u.device)
        failures = torch.zeros(num_sequences, dtype=torch.int32, device=u.device)
        if stepwise:
            final = torch.empty_like(initial_state)
            launch(
                STEPS[op],
                (num_sequences, triton.cdiv(dim, CHANNELS)),
                work(op, "steps", sequences, dim),
                u,
                parameters,
                initial_state,
                states,
                final,
                sequences.cu_seqlens,
                dim,
                AHEAD=AHEAD,
                BLOCK_D=CHANNELS,
                APPROXIMATE=approximate(u.dtype),
                num_warps=1,
                num_stages=1,
            )
        else:
            final = initial_state.clone()  # what sequences without a token end with
            launch(
                SHOOTING[op],
                grid,
                work(op, "shooting", sequences, dim),
                u,
                parameters,
                initial_state,
                states,
                final,
                parts.starts,
                parts.borders,
                sequences.ids,
                residuals,
                failures,
                passes,
                tolerance,
                iterations,
                iterations + sizes["S"] if fallback else iterations,
                D=dim,
                APPROXIMATE=approximate(u.dtype),
                **sizes,
            )
        ctx.save_for_backward(u, parameters, initial_state, states)
        if kept is not None:
            kept.append(states)
        ctx.op, ctx.sequences = op, sequences
        ctx.mark_non_differentiable(residuals, passes, failures)
        return states[:, -1], final, residuals, passes, failures

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor, *_: Any) -> tuple[Any, ...]:
        u, parameters, initial_state, states = ctx.saved_tensors
        dim = u.shape[-1]
        parts = parts_of(ctx.sequences)
        sizes = segments(parts.count, dim)
        d_final = d_final.contiguous()
        d_u, d_initial = torch.empty_like(u), d_final.clone()
        d_parameters = parameters.new_empty(parts.count, *parameters.shape)
        launch(
            BACKWARD[ctx.op],
            (parts.count, triton.cdiv(dim, sizes["C"])),
            work(ctx.op, "backward", ctx.sequences, dim),
            u,
            parameters,
            initial_state,
            states,
            d_output.contiguous(),
            d_final,
            d_u,
            d_parameters,
            d_initial,
            parts.starts,
            parts.borders,
            D=dim,
            **sizes,
        )
        return None, d_u, d_parameters.sum(0), d_initial, *[None] * 6
