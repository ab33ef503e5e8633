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
from pretrain.ops.para_rnn.backward_kernels import KERNELS as BACKWARD
from pretrain.ops.para_rnn.newton_kernels import KERNELS as NEWTON
from pretrain.ops.para_rnn.step_kernels import AHEAD, CHANNELS
from pretrain.ops.para_rnn.step_kernels import KERNELS as STEPS
from pretrain.ops.shared.launching import approximate, launch
from pretrain.ops.shared.planning import Work

# Channels of all sequences from which on steps are less work than Newton's method: by the number
# of instructions that both compile to, no GPU's clock having been asked.
WIDE = 4096
SLOTS = 256  # most parts that the parameters' gradients are left in


def blocks(op: str) -> dict[str, int]:
    """Return a tile's tokens and channels, and its warps.

    16 channels are one memory transaction of 32 bytes; a thread holds 8 numbers of each kind, or 4
    where there are pairs of states, whose scan carries three times as many. More of them spill,
    compiled for Hopper.
    """
    num_warps = 4 if op == "para_gru" else 8
    return {"BLOCK_T": 64, "BLOCK_D": 16, "num_warps": num_warps, "num_stages": 1}


# Instructions of a warp for a token and channel, and cycles for a token, by what the kernels
# compile to; Newton's with four steps.
_COSTS = {
    ("para_gru", "newton"): (20.0, 60),
    ("para_gru", "steps"): (3.2, 150),
    ("para_gru", "backward"): (10.0, 20),
    ("para_lstm", "newton"): (52.0, 90),
    ("para_lstm", "steps"): (3.8, 160),
    ("para_lstm", "backward"): (28.0, 30),
}


def _work(op: str, which: str, u: Tensor, sequences: Sequences) -> Work:
    instructions, cycles = _COSTS[op, which]
    return Work(0.0, instructions * u.numel() / 3, cycles * sequences.max_length)


class ParaRNN(torch.autograd.Function):
    """The kernels as one differentiable function.

    u ``[T, 3, D]``, parameters ``[P, D]`` (recurrent weights, then biases), initial_state ``[N, S,
    D]`` to the output h ``[T, D]`` in u's dtype, the final states, and per sequence and block of
    channels the residual, whether it was stepped for want of convergence, and the Newton steps; all
    0 where it is done in steps from the start (``stepwise``).
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
    ) -> tuple[Tensor, ...]:
        u, parameters, initial_state = (x.contiguous() for x in (u, parameters, initial_state))
        num_sequences, num_states, dim = initial_state.shape
        states = u.new_empty(len(u), num_states, dim)
        final = torch.empty_like(initial_state)
        sizes = blocks(op)
        grid = (num_sequences, triton.cdiv(dim, sizes["BLOCK_D"]))
        residuals = torch.zeros(grid, dtype=initial_state.dtype, device=u.device)
        failures, steps = torch.zeros(2, *grid, dtype=torch.int32, device=u.device).unbind(0)
        if stepwise:
            grid = (num_sequences, triton.cdiv(dim, CHANNELS))
            launch(
                STEPS[op],
                grid,
                _work(op, "steps", u, sequences),
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
            launch(
                NEWTON[op],
                grid,
                _work(op, "newton", u, sequences),
                u,
                parameters,
                initial_state,
                states,
                final,
                residuals,
                failures,
                steps,
                sequences.cu_seqlens,
                dim,
                tolerance,
                ITERATIONS=iterations,
                FALLBACK=fallback,
                **sizes,
            )
        ctx.save_for_backward(u, parameters, initial_state, states)
        ctx.op, ctx.sequences = op, sequences
        ctx.mark_non_differentiable(residuals, failures, steps)
        return states[:, -1], final, residuals, failures, steps

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor, *_: Any) -> tuple[Any, ...]:
        u, parameters, initial_state, states = ctx.saved_tensors
        sequences: Sequences = ctx.sequences
        num_sequences, _, dim = initial_state.shape
        sizes = blocks(ctx.op)
        slots = max(1, min(num_sequences, SLOTS))
        d_u, d_initial = torch.empty_like(u), torch.empty_like(initial_state)
        d_parameters = parameters.new_empty(slots, *parameters.shape)
        launch(
            BACKWARD[ctx.op],
            (slots, triton.cdiv(dim, sizes["BLOCK_D"])),
            _work(ctx.op, "backward", u, sequences),
            u,
            parameters,
            initial_state,
            states,
            d_output.contiguous(),
            d_final.contiguous(),
            d_u,
            d_parameters,
            d_initial,
            sequences.cu_seqlens,
            num_sequences,
            dim,
            **sizes,
        )
        return None, d_u, d_parameters.sum(0), d_initial, None, None, None, None, None
