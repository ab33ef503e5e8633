"""The diagonal recurrence over tiles of time, with a backward pass that is one scan in reverse.

With l_t the gradient of what follows from y_t, itself included: l_t = dy_t + conj(a_{t+1}) l_{t+1},
dx_t = l_t, da_t = l_t conj(y_{t-1}).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.ops.newton.block_scan import solve_backward, solve_forward
from pretrain.ops.newton.tiles import (
    Tiles,
    arrange,
    arrange_gradient,
    last_states,
    previous_states,
    tiles_of,
)
from pretrain.ops.shared.planning import device_type


def tiled_diagonal_scan(
    a: Tensor, x: Tensor, initial_state: Tensor, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Compute the recurrence, the chunks of a tile side by side and tile after tile.

    Shapes are those of
    :func:`pretrain.ops.diagonal_scan.definition.sequential_diagonal_scan`.
    """
    tiles = tiles_of(sequences, x.shape[-1], device_type(x), shooting=False)
    found: tuple[Tensor, Tensor] = _TiledScan.apply(a, x, initial_state, tiles)
    return found


class _TiledScan(torch.autograd.Function):
    """The recurrence as one differentiable function, of shapes as in the definition."""

    @staticmethod
    @override
    def forward(
        ctx: Any, a: Tensor, x: Tensor, initial_state: Tensor, tiles: Tiles
    ) -> tuple[Tensor, Tensor]:
        decay, states = arrange(a[:, None], tiles), arrange(x[:, None], tiles)  # [1, m, n, D]
        start = initial_state[tiles.order][None]  # what each tile starts from, by rank
        for first, counts in tiles.tiles:
            part = slice(first, first + sum(counts))
            step, solved = decay[:, :, part], states[:, :, part]
            solved[:, 0, : counts[0]].addcmul_(step[:, 0, : counts[0]], start[:, : counts[0]])
            solve_forward(step[None].clone(), solved, counts)
            start = solved[:, -1, -counts[-1] :]
        ctx.save_for_backward(decay, states, initial_state)
        ctx.tiles = tiles
        output = states.flatten(1, 2).index_select(1, tiles.slot)[0]
        return output, last_states(states, initial_state[:, None], tiles)[:, 0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_output: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        decay, states, initial_state = ctx.saved_tensors
        tiles: Tiles = ctx.tiles
        gradient = arrange_gradient(states, d_output[:, None], d_final[:, None], tiles)
        d_decay = torch.empty_like(decay)
        ordered = initial_state[tiles.order][None]
        incoming = torch.zeros_like(ordered)  # gradient of what each tile starts from, by rank
        for i in reversed(range(len(tiles.tiles))):
            first, counts = tiles.tiles[i]
            part = slice(first, first + sum(counts))
            start = ordered if i == 0 else states[:, -1, first - tiles.tiles[i - 1][1][-1] : first]
            solved = gradient[:, :, part]
            # solve_backward uses its copy up.
            step = decay[:, :, part].conj().resolve_conj()[None].clone()
            incoming[:, : counts[0]] = solve_backward(
                step, solved, counts, incoming[:, : counts[-1]]
            )
            previous = previous_states(states[:, :, part], start, counts, tiles.before[i])
            torch.mul(solved, previous.conj(), out=d_decay[:, :, part])
        d_initial = torch.where(tiles.ends[:, None] >= 0, 0, d_final)
        started = tiles.tiles[0][1][0] if tiles.tiles else 0
        d_initial[tiles.order[:started]] += incoming[0, :started]
        d_a, d_x = (t[0].flatten(0, 1).index_select(0, tiles.slot) for t in (d_decay, gradient))
        return d_a, d_x, d_initial, None
