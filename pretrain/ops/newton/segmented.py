"""Elementwise recurrences over a row that is divided over ranks: Newton's method for the borders.

Each rank computes its segment from a guess of the state that enters it. The states at the borders
then follow a linear recurrence of the ends and of the products of Jacobians over the segments, as
the starts of chunks do in :mod:`pretrain.ops.newton.shooting`. A segment is right after as many
rounds as there are ranks up to it, whatever the products are; usual gates forget and take two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.data.sequences import Segment, Sequences
from pretrain.ops.across import gather, left_gradient, multiply
from pretrain.ops.newton.block_scan import compose_, solve_backward
from pretrain.ops.newton.cell import ElementwiseCell

# Rounds that are planned on the meta device, where no number says when borders rest.
USUAL_ROUNDS = 2

Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def segmented_recurrence(
    run: Run,
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    state: Tensor,
    sequences: Sequences,
    segment: Segment,
    tolerance: float,
) -> tuple[Tensor, Tensor]:
    """Run ``cell`` over x ``[L, G, D]`` of a segment, until borders move at most ``tolerance``.

    ``run(x, parameters, state)`` is the recurrence of the pieces alone, from states ``[N, S, D]``
    to all states ``[L, S, D]`` and the last; it is called without gradients.
    """
    result: tuple[Tensor, Tensor] = _Segmented.apply(
        x, parameters, state, run, cell, sequences, segment, tolerance
    )
    return result


class _Segmented(torch.autograd.Function):
    @staticmethod
    @override
    def forward(
        ctx: Any,
        x: Tensor,
        parameters: Tensor,
        state: Tensor,
        run: Run,
        cell: ElementwiseCell,
        sequences: Sequences,
        segment: Segment,
        tolerance: float,
    ) -> tuple[Tensor, Tensor]:
        own = segment.rank
        border = x.new_zeros(x.shape[-1], cell.num_states, 1)
        for round_ in range(segment.size):
            if segment.continues[own]:
                state = torch.cat([border.squeeze(2).t()[None], state[1:]])
            states, final = run(x, parameters, state)
            product = x.new_zeros(x.shape[-1], cell.num_states, cell.num_states)
            if segment.through[own]:
                jacobian, _ = _linearize(cell, x, parameters, state, states, sequences)
                product = _product(jacobian)
            end = final[-1].t()[..., None]
            ends, borders, products = gather(segment, end, border, product)
            moved = _moved(segment, ends, borders, products)
            shift = (moved - borders).abs()
            shift = shift if cell.bounded else shift / (1 + borders.abs())
            # Every rank finds the same, and leaves with the others.
            last = min(segment.size, USUAL_ROUNDS) if x.is_meta else segment.size
            if round_ + 1 == last or bool(shift.amax() <= tolerance):
                break
            # A border that is right stays as it is, whatever other sequences need.
            if not bool(shift[own].amax() <= tolerance):
                border = moved[own]
        ctx.save_for_backward(x, parameters, state, states, products)
        ctx.given = cell, sequences, segment
        return states, final

    @staticmethod
    @torch.autograd.function.once_differentiable
    @override
    def backward(ctx: Any, d_states: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters, state, states, products = ctx.saved_tensors
        cell, sequences, segment = ctx.given
        jacobian, known = _linearize(cell, x, parameters, state, states, sequences)
        starts, last = sequences.derive(_starts), sequences.cu_seqlens[1:].long() - 1
        length, (positions, chunks) = len(x), jacobian.shape[2:4]
        slots = starts % positions, starts // positions
        at_starts = jacobian[:, :, slots[0], slots[1]]  # [S, S, N - 1, D], of later pieces
        jacobian[:, :, slots[0], slots[1]] = 0
        gradient = d_states.index_add(0, last, d_final)
        counts, nothing = [1] * chunks, x.new_zeros(cell.num_states, 1, x.shape[-1])
        solved = _lay(gradient, positions)
        leaving = solve_backward(jacobian.clone(), solved, counts, nothing)
        entered = leaving.permute(2, 0, 1)
        if not segment.continues[segment.rank]:
            entered = torch.zeros_like(entered)
        (all_entered,) = gather(segment, entered)
        left = left_gradient(segment, all_entered, products)
        if left is not None:
            solved, incoming = _lay(gradient, positions), left.permute(1, 2, 0).contiguous()
            leaving = solve_backward(jacobian, solved, counts, incoming)
        # What came in went through the padding.
        flat = solved.transpose(1, 2).flatten(1, 2)[:, :length]
        solved = _lay(flat.transpose(0, 1), positions)
        d_x, d_parameters = cell.vjp(known, parameters, solved)
        d_state = torch.zeros_like(state)
        if not segment.continues[segment.rank]:
            d_state[0] = leaving[:, 0]
        d_state[1:] = torch.einsum("ijnd,ind->njd", at_starts, flat[:, starts])
        d_x = d_x.transpose(1, 2).flatten(1, 2)[:, :length].transpose(0, 1)
        return d_x, d_parameters, d_state, None, None, None, None, None


def _moved(segment: Segment, ends: Tensor, borders: Tensor, products: Tensor) -> Tensor:
    """Return the states ``[size, D, S, 1]`` that enter the segments after a Newton step."""
    moved = [torch.zeros_like(ends[0])]
    for rank in range(segment.size - 1):
        entering = ends[rank]
        if segment.through[rank]:
            entering = entering + multiply(products[rank], moved[rank] - borders[rank])
            # A product that has no number is left out: the end is then handed over as it is.
            entering = torch.where(entering.isfinite(), entering, ends[rank])
        moved.append(entering if segment.continues[rank + 1] else torch.zeros_like(entering))
    return torch.stack(moved)


def _linearize(
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    state: Tensor,
    states: Tensor,
    sequences: Sequences,
) -> tuple[Tensor, Any]:
    """Return Jacobians ``[S, S, m, n, D]`` at the solved states, and what ``vjp`` needs.

    Tokens are in n chunks of m; padding behind the last has the identity.
    """
    previous = torch.cat([state[:1], states[:-1]])
    previous[sequences.derive(_starts)] = state[1:]
    positions = max(1, round(len(x) ** 0.5))
    _, jacobian, known = cell.linearize(_lay(previous, positions), _lay(x, positions), parameters)
    padding = -len(x) % positions
    if padding:
        one = torch.eye(cell.num_states, dtype=x.dtype, device=x.device)
        jacobian[:, :, positions - padding :, -1] = one[:, :, None, None]
    return jacobian, known


def _starts(sequences: Sequences) -> Tensor:
    """Return where all pieces but the first begin."""
    return sequences.cu_seqlens[1:-1].long()


def _lay(x: Tensor, positions: int) -> Tensor:
    """Arrange ``[L, C, D]`` as ``[C, m, n, D]``, zeros at padding."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -len(x) % positions))
    return padded.unflatten(0, (-1, positions)).permute(2, 1, 0, 3).contiguous()


def _product(jacobian: Tensor) -> Tensor:
    """Return the product ``[D, S, S]`` of Jacobians ``[S, S, m, n, D]``, the last on the left."""
    product = jacobian[:, :, 0].clone()
    for i in range(1, jacobian.shape[2]):
        compose_(product, jacobian[:, :, i], product)
    total = product[:, :, :1].clone()
    for i in range(1, product.shape[2]):
        compose_(total, product[:, :, i : i + 1], total)
    return total[:, :, 0].permute(2, 0, 1)
