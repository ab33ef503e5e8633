"""Newton's method over tiles of time, with a backward pass that is one linear solve in reverse."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.ops.newton.block_scan import solve_backward, solve_forward
from pretrain.ops.newton.cell import ElementwiseCell
from pretrain.ops.newton.definition import sequential_recurrence
from pretrain.ops.newton.options import NewtonOptions
from pretrain.ops.newton.shooting import shoot_tile
from pretrain.ops.newton.tiles import (
    Tiles,
    arrange,
    arrange_gradient,
    last_states,
    previous_states,
    tiles_of,
)
from pretrain.ops.shared.planning import count_true, device_type

_USUAL_STEPS = 3  # Newton steps that bounded recurrent weights take in float32


class Newton(torch.autograd.Function):
    """The solve as one differentiable function.

    x [T, G, D], parameters [P, D], initial_state [N, S, D] to states [T, S, D] and the last.
    """

    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        parameters: Tensor,
        initial_state: Tensor,
        cell: ElementwiseCell,
        sequences: Sequences,
        options: NewtonOptions,
    ) -> tuple[Tensor, Tensor]:
        tiles = tiles_of(sequences, x.shape[-1], device_type(x), cell.shooting)
        tolerance = options.tolerance_in(x.dtype)
        inner = arrange(x, tiles)
        size, dim = cell.num_states, x.shape[-1]
        states = x.new_empty(size, tiles.positions, tiles.chunks, dim)
        start = initial_state[tiles.order].transpose(0, 1).contiguous()
        worst, used = x.new_zeros(sequences.count), 0
        for (first, counts), before in zip(tiles.tiles, tiles.before, strict=True):
            part = slice(first, first + sum(counts))
            xs = inner[:, :, part]
            how = tiles.sequence[part], len(worst), options.iterations, tolerance
            h = states[:, :, part]
            if cell.shooting:
                residual, steps = shoot_tile(cell, h, xs, parameters, start, counts, *how)
            else:
                guess = cell.step(x.new_zeros(size, *xs.shape[1:]), xs, parameters)
                solved, residual, steps = _solve_tile(
                    cell, guess, xs, parameters, start, counts, before, *how
                )
                h.copy_(solved)
            worst, used = torch.maximum(worst, residual), max(used, steps)
            start = h[:, -1, -counts[-1] :]
        failed = ~(worst <= tolerance)
        num_failed = count_true(failed, 0) if options.fallback else 0
        if options.report is not None:
            options.report.add(
                float(worst.max()) if len(worst) else 0.0, num_failed, len(worst), used
            )
        if num_failed:
            _solve_again(cell, x, parameters, initial_state, sequences, failed, states, tiles)
        final = last_states(states, initial_state, tiles)
        ctx.save_for_backward(inner, parameters, initial_state, states)
        ctx.cell, ctx.tiles = cell, tiles
        return states.flatten(1, 2).index_select(1, tiles.slot).transpose(0, 1), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_states: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        inner, parameters, initial_state, states = ctx.saved_tensors
        cell, tiles = ctx.cell, ctx.tiles
        g = arrange_gradient(states, d_states, d_final, tiles)
        d_inner, d_parameters = torch.empty_like(inner), torch.zeros_like(parameters)
        ordered = initial_state[tiles.order].transpose(0, 1)
        incoming = g.new_zeros(ordered.shape)  # gradient of what each tile starts from, by rank
        d_initial = torch.where(tiles.ends[:, None, None] >= 0, 0, d_final)
        for i in reversed(range(len(tiles.tiles))):
            first, counts = tiles.tiles[i]
            part = slice(first, first + sum(counts))
            if i:
                begins = first - tiles.tiles[i - 1][1][-1]
                start = states[:, -1, begins:first]
            else:
                start = ordered
            xs = inner[:, :, part]
            previous = previous_states(states[:, :, part], start, counts, tiles.before[i])
            _, jacobian, known = cell.linearize(previous, xs, parameters)
            cotangent = g[:, :, part]
            incoming[:, : counts[0]] = solve_backward(
                jacobian, cotangent, counts, incoming[:, : counts[-1]]
            )
            d_inner[:, :, part], d_p = cell.vjp(known, parameters, cotangent)
            d_parameters += d_p
        started = tiles.tiles[0][1][0] if tiles.tiles else 0
        d_initial[tiles.order[:started]] += incoming[:, :started].transpose(0, 1)
        d_x = d_inner.flatten(1, 2).index_select(1, tiles.slot).transpose(0, 1)
        return d_x, d_parameters, d_initial, None, None, None


def _solve_tile(
    cell: ElementwiseCell,
    h: Tensor,
    xs: Tensor,
    parameters: Tensor,
    start: Tensor,
    counts: list[int],
    before: Tensor | None,
    sequence: Tensor,
    num_sequences: int,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, Tensor, int]:
    """Make Newton steps from the guess ``h`` until every sequence's residual is small.

    That is at most ``tolerance``, or after ``iterations`` steps. Returns the states, the residuals
    ``[N]`` and the number of steps.
    """
    residual = h.new_zeros(num_sequences)
    unsolved = torch.ones_like(residual, dtype=torch.bool)
    for step in range(iterations + 1):
        previous = previous_states(h, start, counts, before)
        jacobian = None
        if step < _USUAL_STEPS:
            value, jacobian, _ = cell.linearize(previous, xs, parameters)
        else:  # most likely there is nothing left to solve
            value = cell.step(previous, xs, parameters)
        value = value - h
        size = value.abs() if cell.bounded else value.abs() / (1 + h.abs())
        # amax keeps NaN, so a sequence that blew up is not taken for a converged one.
        found = torch.zeros_like(residual).scatter_reduce_(
            0, sequence, size.amax((0, 1, 3)), "amax"
        )
        residual = torch.where(unsolved, found, residual)
        unsolved = unsolved & ~(residual <= tolerance)
        hopeful = unsolved & residual.isfinite()
        count = count_true(hopeful, num_sequences if step < _USUAL_STEPS else 0)
        if not count or step == iterations:
            break
        if jacobian is None:
            jacobian = cell.linearize(previous, xs, parameters)[1]
        solve_forward(jacobian, value, counts)
        # A sequence that has converged stays as it is, whatever its neighbours need.
        if count < num_sequences:
            value = torch.where(hopeful[sequence][:, None], value, 0)
        h += value
    return h, residual, step


def _solve_again(
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    initial_state: Tensor,
    sequences: Sequences,
    failed: Tensor,
    states: Tensor,
    tiles: Tiles,
) -> None:
    """Compute step by step the sequences that have not converged, into ``states``."""
    tokens = failed[sequences.ids]
    again = Sequences.from_lengths(sequences.sizes[failed].tolist(), sequences.device)
    right, _ = sequential_recurrence(cell, x[tokens], parameters, initial_state[failed], again)
    # Padding of these sequences may hold anything, NaN included: backward would spread it.
    states[:, :, failed[tiles.sequence]] = 0
    states.flatten(1, 2)[:, tiles.slot[tokens]] = right.transpose(0, 1)
