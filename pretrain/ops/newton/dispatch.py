"""Elementwise non-linear recurrences, parallel over time by Newton's method (ParaRNN, 2510.21450).

The states h_1..h_T of h_l = f(h_{l-1}, x_l) are one system of equations. A Newton step linearises f
at every position at once and solves the resulting linear recurrence by a scan; convergence is
quadratic. The backward pass is a single such solve in reverse. It works for every f whose Jacobian
df/dh couples at most the S states of one channel.

Long sequences are worked off tile by tile, each tile's start being exact before it begins. Every
sequence that has not converged is computed again step by step, and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data.sequences import chunk_layout, max_length, remember, sequence_ids
from pretrain.ops.newton.block_scan import solve_backward, solve_forward
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    count_true,
    device_type,
    resolve_sequences,
    resolve_state,
)

BACKENDS = ("auto", "sequential", "newton")
_USUAL_STEPS = 3  # Newton steps that bounded recurrent weights take in float32
Linear = tuple[Tensor, Tensor, Any]


class NewtonReport:
    """What the solver did since the report was made.

    residual: largest |f(h_{l-1}, x_l) - h_l| (of the public cells' bounded states; else divided by
    1 + |h_l|) after the last Newton step, before any fallback;
    fallbacks: sequences that had not converged and were computed step by step; sequences: of how
    many; iterations: the most Newton steps that any stretch of time took.

    On a GPU the numbers stay there until one is asked for, so that nothing waits for them.
    """

    def __init__(self) -> None:
        self.sequences = 0
        self._worst: Tensor | None = None  # [2]: residual, iterations
        self._fallbacks: Tensor | int = 0

    def add(
        self,
        residual: float | Tensor,
        fallbacks: int | Tensor,
        sequences: int,
        iterations: int | Tensor,
    ) -> None:
        device = residual.device if isinstance(residual, Tensor) else None
        pair = [torch.as_tensor(x, device=device).double() for x in (residual, iterations)]
        new = torch.stack(pair)
        # A residual that is not a number is the largest of all, and stays it.
        self._worst = new if self._worst is None else torch.maximum(self._worst, new)
        self._fallbacks = self._fallbacks + fallbacks
        self.sequences += sequences

    def __repr__(self) -> str:
        return (
            f"NewtonReport(residual={self.residual:.3g}, fallbacks={self.fallbacks}, "
            f"sequences={self.sequences}, iterations={self.iterations})"
        )

    @property
    def residual(self) -> float:
        return 0.0 if self._worst is None else float(self._worst[0])

    @property
    def iterations(self) -> int:
        return 0 if self._worst is None else int(self._worst[1])

    @property
    def fallbacks(self) -> int:
        return int(self._fallbacks)


class ElementwiseCell:
    """A cell ``step(h [S, ..., D], x [G, ..., D], parameters [P, D]) -> h' [S, ..., D]``,
    elementwise over everything but S, G and P; derivatives by ``torch.func`` unless a subclass
    knows better."""

    bounded = False  # whether states stay within about 1, so that residuals need no scale

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor], num_states: int = 1):
        self.step, self.num_states = step, num_states

    def linearize(self, h: Tensor, x: Tensor, parameters: Tensor) -> Linear:
        """f, its Jacobian ``[S, S, ..., D]`` (to, from), and what :meth:`vjp` wants to be told."""
        columns = []
        for s in range(self.num_states):
            tangent = torch.zeros_like(h)
            tangent[s] = 1
            pair: Any = torch.func.jvp(lambda t: self.step(t, x, parameters), (h,), (tangent,))
            value, column = pair
            columns.append(column)
        return value, torch.stack(columns, 1), (h, x)

    def vjp(self, known: Any, parameters: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of x and the parameters where f's is ``cotangent``."""
        h, x = known
        pair: Any = torch.func.vjp(lambda a, p: self.step(h, a, p), x, parameters)
        d_x, d_parameters = pair[1](cotangent)
        return d_x, d_parameters


def newton_recurrence(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    parameters: Tensor,
    *,
    num_states: int = 1,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
) -> tuple[Tensor, Tensor]:
    """Any elementwise recurrence ``step(h, x, parameters) -> h``, in parallel over time.

    ``step`` sees h ``[S, ..., D]``, x ``[G, ..., D]`` and parameters ``[P, D]`` and must treat the
    axes between the first and last elementwise, and the channels too: h'[:, d] may depend on
    h[:, d] alone. x: ``[B, T, G, D]``; parameters ``[P, D]``; S is ``num_states``. Returns all
    states ``[B, T, S, D]`` in x's dtype and the last ``[N, S, D]``, float32 or wider. The other
    arguments are those of :func:`pretrain.ops.para_gru`.
    """
    return elementwise_recurrence(
        "newton_recurrence",
        ElementwiseCell(step, num_states),
        x,
        parameters,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        backend=backend,
        iterations=iterations,
        tolerance=tolerance,
        fallback=fallback,
        report=report,
    )


def elementwise_recurrence(
    op: str,
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    *,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    backend: str,
    iterations: int,
    tolerance: float | None,
    fallback: bool,
    report: NewtonReport | None,
) -> tuple[Tensor, Tensor]:
    """What :func:`newton_recurrence`, ``para_gru`` and ``para_lstm`` share."""
    if x.ndim != 4:
        raise ValueError(f"{op}: the input is {tuple(x.shape)}, expected [B, T, gates, D]")
    batch_size, length, _, dim = x.shape
    check_shapes(op, {"parameters": (parameters, (parameters.shape[0], dim))})
    check_iterations(op, iterations)
    cu_seqlens, lengths = resolve_sequences(op, batch_size, length, cu_seqlens, x.device)
    state = resolve_state(
        op, initial_state, (len(lengths), cell.num_states, dim), x, "sequences, states, channels"
    )
    dtype = state.dtype
    rows, parameters = x.flatten(0, 1).to(dtype), parameters.to(dtype)
    fast = "newton" if max(lengths, default=0) > 1 else "sequential"
    backend = choose_backend(op, backend, BACKENDS, "sequential", fast)
    if backend == "sequential":
        states, state = _sequential(cell, rows, parameters, state, cu_seqlens)
    else:
        states, state = _Newton.apply(
            rows,
            parameters,
            state,
            cell,
            cu_seqlens,
            iterations,
            default_tolerance(dtype) if tolerance is None else tolerance,
            fallback,
            report,
        )
    return states.to(x.dtype).view(batch_size, length, cell.num_states, dim), state


def check_iterations(op: str, iterations: int) -> None:
    """Raises ValueError for less than one Newton step."""
    if iterations < 1:
        raise ValueError(f"{op}: iterations is {iterations}, expected at least 1")


def default_tolerance(dtype: torch.dtype) -> float:
    """Of residuals of states in ``dtype``."""
    return 1e-11 if dtype == torch.float64 else 1e-5


def _sequential(
    cell: ElementwiseCell, x: Tensor, parameters: Tensor, state: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor]:
    """The definition, step after step, all sequences side by side. x ``[T, G, D]``, state
    ``[N, S, D]``; returns all states ``[T, S, D]`` and the last."""
    layout = chunk_layout(cu_seqlens, 1)
    counts = [count for _, count in layout.steps]
    inputs = x[layout.token_index[:, 0]].transpose(0, 1).split(counts, 1)
    h = state[layout.order].transpose(0, 1)
    states, ended = [], []
    for inner, count in zip(inputs, counts, strict=True):
        if count < h.shape[1]:
            ended.append(h[:, count:])
            h = h[:, :count]
        h = cell.step(h, inner, parameters)
        states.append(h)
    last = torch.cat([h, *reversed(ended)], 1).transpose(0, 1)[torch.argsort(layout.order)]
    if not states:
        return x.new_zeros(0, *state.shape[1:]), last
    return torch.cat(states, 1).transpose(0, 1)[layout.token_slot], last


@dataclass(frozen=True)
class _Tiles:
    """Where tokens lie in ``[positions, chunks]``, and which chunks make a tile.

    place: ``[m * n]`` token of each place (any at padding); padding: places without a token; slot:
    ``[T]`` place of each token; tiles: (first chunk, counts of chunks per step); before: for each
    tile the chunk before each of its chunks behind the first step, or None where that is simply as
    many back as the step has; ends: place of each sequence's last token, or -1; order: sequences by
    rank; sequence: ``[n]`` of each chunk
    """

    positions: int
    chunks: int
    place: Tensor
    padding: Tensor
    slot: Tensor
    tiles: list[tuple[int, list[int]]]
    before: list[Tensor | None]
    ends: Tensor
    order: Tensor
    sequence: Tensor


@remember
def _tiles(cu_seqlens: Tensor, dim: int, device_type: str) -> _Tiles:
    lengths = cu_seqlens.diff()
    longest, num_sequences = max_length(cu_seqlens), len(lengths)
    # A tile's few arrays should stay in a CPU's cache; a GPU prefers to do all at once.
    elements = 2**18 if device_type == "cpu" else 2**26
    tile_length = max(64, min(longest, elements // max(1, num_sequences * dim)))
    m = max(1, min(longest, round((tile_length / 2) ** 0.5)))
    steps_per_tile = max(1, round(tile_length / m))
    layout = chunk_layout(cu_seqlens, m)
    n, total = len(layout.token_index), len(layout.token_slot)
    index = layout.token_index.t().reshape(-1)
    padding = (index == total).nonzero()[:, 0]
    slot = layout.token_slot % m * n + layout.token_slot // m
    counts = [count for _, count in layout.steps]
    tiles, ranks = [], []
    before: list[Tensor | None] = []
    for i in range(0, len(counts), steps_per_tile):
        inner = counts[i : i + steps_per_tile]
        tiles.append((layout.steps[i][0], inner))
        ranks += [torch.arange(count) for count in inner]
        if inner[-1] == inner[0]:
            before.append(None)  # shifting by a whole step is enough
        else:
            first = [0, *torch.tensor(inner).cumsum(0).tolist()]
            places = [torch.arange(a, a + c) for a, c in zip(first, inner[1:], strict=False)]
            before.append(torch.cat(places).to(cu_seqlens.device))
    order = layout.order
    rank = torch.cat(ranks).to(order.device) if ranks else order[:0]
    last = cu_seqlens[1:].long() - 1
    ends = torch.where(lengths > 0, slot[last.clamp_min(0)] if total else last, -1)
    return _Tiles(
        m,
        n,
        index.clamp_max(max(total - 1, 0)),
        padding,
        slot,
        tiles,
        before,
        ends,
        order,
        order[rank],
    )


def _previous(h: Tensor, start: Tensor, counts: list[int], before: Tensor | None) -> Tensor:
    """The states before those of a tile: h ``[S, m, n, D]``, start ``[S, N, D]`` by rank."""
    previous = torch.empty_like(h)
    previous[:, 1:] = h[:, :-1]
    previous[:, 0, : counts[0]] = start[:, : counts[0]]
    if before is None:
        previous[:, 0, counts[0] :] = h[:, -1, : h.shape[2] - counts[0]]
    else:
        previous[:, 0, counts[0] :] = h[:, -1].index_select(1, before)
    return previous


class _Newton(torch.autograd.Function):
    """x [T, G, D], parameters [P, D], initial_state [N, S, D] to states [T, S, D] and the last."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        parameters: Tensor,
        initial_state: Tensor,
        cell: ElementwiseCell,
        cu_seqlens: Tensor,
        iterations: int,
        tolerance: float,
        fallback: bool,
        report: NewtonReport | None,
    ) -> tuple[Tensor, Tensor]:
        tiles = _tiles(cu_seqlens, x.shape[-1], device_type(x))
        inner = _arrange(x, tiles)
        size, dim = cell.num_states, x.shape[-1]
        states = x.new_empty(size, tiles.positions, tiles.chunks, dim)
        start = initial_state[tiles.order].transpose(0, 1).contiguous()
        worst, used = x.new_zeros(len(cu_seqlens) - 1), 0
        for (first, counts), before in zip(tiles.tiles, tiles.before, strict=True):
            part = slice(first, first + sum(counts))
            xs = inner[:, :, part]
            h = cell.step(x.new_zeros(size, *xs.shape[1:]), xs, parameters)
            h, residual, steps = _solve_tile(
                cell,
                h,
                xs,
                parameters,
                start,
                counts,
                before,
                tiles.sequence[part],
                len(worst),
                iterations,
                tolerance,
            )
            worst, used = torch.maximum(worst, residual), max(used, steps)
            states[:, :, part] = h
            start = h[:, -1, -counts[-1] :]
        failed = ~(worst <= tolerance)
        num_failed = count_true(failed, 0) if fallback else 0
        if report is not None:
            report.add(float(worst.max()) if len(worst) else 0.0, num_failed, len(worst), used)
        if num_failed:
            _solve_again(cell, x, parameters, initial_state, cu_seqlens, failed, states, tiles)
        flat = states.flatten(1, 2)
        final = initial_state.clone()
        ended = tiles.ends >= 0
        final[ended] = flat[:, tiles.ends[ended]].transpose(0, 1)
        ctx.save_for_backward(inner, parameters, initial_state, states)
        ctx.cell, ctx.tiles = cell, tiles
        return flat[:, tiles.slot].transpose(0, 1), final

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_states: Tensor, d_final: Tensor) -> tuple[Tensor | None, ...]:
        inner, parameters, initial_state, states = ctx.saved_tensors
        cell, tiles = ctx.cell, ctx.tiles
        g = torch.zeros_like(states)
        flat = g.flatten(1, 2)
        flat[:, tiles.slot] = d_states.transpose(0, 1)
        ended = tiles.ends >= 0
        flat[:, tiles.ends[ended]] += d_final[ended].transpose(0, 1)
        d_inner, d_parameters = torch.empty_like(inner), torch.zeros_like(parameters)
        ordered = initial_state[tiles.order].transpose(0, 1)
        incoming = g.new_zeros(ordered.shape)  # gradient of what each tile starts from, by rank
        d_initial = torch.where(ended[:, None, None], 0, d_final)
        for i in reversed(range(len(tiles.tiles))):
            first, counts = tiles.tiles[i]
            part = slice(first, first + sum(counts))
            if i:
                begins = first - tiles.tiles[i - 1][1][-1]
                start = states[:, -1, begins:first]
            else:
                start = ordered
            xs = inner[:, :, part]
            previous = _previous(states[:, :, part], start, counts, tiles.before[i])
            _, jacobian, known = cell.linearize(previous, xs, parameters)
            cotangent = g[:, :, part]
            incoming[:, : counts[0]] = solve_backward(
                jacobian, cotangent, counts, incoming[:, : counts[-1]]
            )
            d_inner[:, :, part], d_p = cell.vjp(known, parameters, cotangent)
            d_parameters += d_p
        started = tiles.tiles[0][1][0] if tiles.tiles else 0
        d_initial[tiles.order[:started]] += incoming[:, :started].transpose(0, 1)
        d_x = d_inner.flatten(1, 2)[:, tiles.slot].transpose(0, 1)
        return d_x, d_parameters, d_initial, None, None, None, None, None, None


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
    """Newton steps from the guess ``h`` until every sequence's residual is at most ``tolerance``,
    or ``iterations`` of them. Returns the states, the residuals ``[N]`` and the number of steps."""
    residual = h.new_zeros(num_sequences)
    unsolved = torch.ones_like(residual, dtype=torch.bool)
    for step in range(iterations + 1):
        previous = _previous(h, start, counts, before)
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


def _arrange(x: Tensor, tiles: _Tiles) -> Tensor:
    """``[T, G, D]`` to ``[G, m, n, D]``, zeros at padding."""
    if not len(x):
        return x.new_zeros(x.shape[1], tiles.positions, 0, x.shape[2])
    inner = x.transpose(0, 1)[:, tiles.place]
    if len(tiles.padding):
        inner[:, tiles.padding] = 0
    return inner.unflatten(1, (tiles.positions, tiles.chunks))


def _solve_again(
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    failed: Tensor,
    states: Tensor,
    tiles: _Tiles,
) -> None:
    """Step by step, the sequences that have not converged."""
    tokens = failed[sequence_ids(cu_seqlens)]
    lengths = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens.diff()[failed]]).cumsum(0)
    right, _ = _sequential(cell, x[tokens], parameters, initial_state[failed], lengths)
    # Padding of these sequences may hold anything, NaN included: backward would spread it.
    states[:, :, failed[tiles.sequence]] = 0
    states.flatten(1, 2)[:, tiles.slot[tokens]] = right.transpose(0, 1)
