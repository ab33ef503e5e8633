"""Newton's method for the starts of chunks alone (multiple shooting).

All chunks of a tile are stepped through side by side, each from its start, and the product R of the
Jacobians is carried beside the states. Where a chunk ends and the next one of its sequence was
started there is a gap; the starts' shifts follow shift_{j+1} = R_j shift_j + gap_j. Every position
is looked at once in an iteration, where Newton's method for all states looks at it once to
linearise and twice to solve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.ops.newton.block_scan import compose_
from pretrain.ops.newton.cell import ElementwiseCell
from pretrain.ops.shared.planning import count_true

_USUAL_STEPS = 3  # iterations that bounded recurrent weights take in float32


def shoot_tile(
    cell: ElementwiseCell,
    h: Tensor,
    xs: Tensor,
    parameters: Tensor,
    start: Tensor,
    counts: list[int],
    sequence: Tensor,
    num_sequences: int,
    iterations: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Fill the states h ``[S, m, n, D]`` of a tile, iterating until no start of a chunk moves.

    xs ``[G, m, n, D]`` are its inputs, start ``[S, N, D]`` the states before it by rank; counts
    and sequence are those of :class:`pretrain.ops.newton.tiles.Tiles`. It ends when no
    start would move by more than ``tolerance``, or after ``iterations``. Returns by how much the
    starts of each sequence would still move ``[N]``, and the number of iterations.
    """
    starts = torch.zeros_like(h[:, 0])
    starts[:, : counts[0]] = start[:, : counts[0]]
    residual = h.new_zeros(num_sequences)
    unsolved = torch.ones_like(residual, dtype=torch.bool)
    for step in range(1, iterations + 1):
        state, product = starts, starts
        for i in range(h.shape[1]):
            state, jacobian, _ = cell.linearize(state, xs[:, i], parameters)
            h[:, i] = state
            if i == 0:
                product = jacobian
            else:
                compose_(product, jacobian, product)
        shift = _shifts(state, product, starts, counts)
        moves = shift.abs() if cell.bounded else shift.abs() / (1 + starts.abs())
        # amax keeps NaN, so a sequence that blew up is not taken for a converged one.
        found = torch.zeros_like(residual).scatter_reduce_(0, sequence, moves.amax((0, 2)), "amax")
        residual = torch.where(unsolved, found, residual)
        unsolved = unsolved & ~(residual <= tolerance)
        hopeful = unsolved & residual.isfinite()
        count = count_true(hopeful, num_sequences if step < _USUAL_STEPS else 0)
        if not count or step == iterations:
            break
        # A sequence that has converged stays as it is, whatever its neighbours need.
        if count < num_sequences:
            shift = torch.where(hopeful[sequence][:, None], shift, 0)
        starts += shift
    return residual, step


def _shifts(ends: Tensor, maps: Tensor, starts: Tensor, counts: list[int]) -> Tensor:
    """Return by how much the starts ``[S, n, D]`` of chunks move, the first step's by 0.

    ends ``[S, n, D]`` is what the chunks end with, maps ``[S, S, n, D]`` are their products of
    Jacobians.
    """
    shift = torch.zeros_like(starts)
    shifts, ends_of, maps_of = shift.split(counts, 1), ends.split(counts, 1), maps.split(counts, 2)
    for j, (begun, n) in enumerate(zip(starts.split(counts, 1), counts, strict=True)):
        if j == 0:
            continue
        moved = torch.sub(ends_of[j - 1][:, :n], begun, out=shifts[j])
        for s in range(len(starts)):
            moved.addcmul_(maps_of[j - 1][:, s, :n], shifts[j - 1][s, :n])
    return shift
