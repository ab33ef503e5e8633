"""Elementwise non-linear recurrences, parallel over time by Newton's method (ParaRNN, 2510.21450).

The states h_1..h_T of h_l = f(h_{l-1}, x_l) are one system of equations. A Newton step linearises f
at every position at once and solves the resulting linear recurrence by a scan; convergence is
quadratic. The backward pass is a single such solve in reverse. It works for every f whose Jacobian
df/dh couples at most the S states of one channel.

Cells with derivatives by hand (ParaGRU, ParaLSTM) are stepped through in chunks side by side, with
Newton's method for the chunks' starts alone; it looks at every position once in an iteration.

Long sequences are worked off tile by tile, each tile's start being exact before it begins. Every
sequence that has not converged is computed again step by step, and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from pretrain.data.sequences import Segment, Sequences, given_sequences, pieces_alone
from pretrain.ops.across import crossing
from pretrain.ops.newton.cell import ElementwiseCell
from pretrain.ops.newton.definition import sequential_recurrence
from pretrain.ops.newton.options import NewtonOptions, NewtonReport
from pretrain.ops.newton.segmented import segmented_recurrence
from pretrain.ops.newton.solver import Newton
from pretrain.ops.shared.arguments import (
    check_shapes,
    choose_backend,
    resolve_sequences,
    resolve_state,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.watching import Watch, one_step_before

BACKENDS = ("auto", "sequential", "newton")


@without_autocast
def newton_recurrence(
    step: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    parameters: Tensor,
    *,
    num_states: int = 1,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute any elementwise recurrence ``step(h, x, parameters) -> h``, in parallel over time.

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
        sequences=given_sequences("newton_recurrence", sequences, cu_seqlens),
        backend=backend,
        options=NewtonOptions(iterations, tolerance, fallback, report),
    )


def elementwise_recurrence(
    op: str,
    cell: ElementwiseCell,
    x: Tensor,
    parameters: Tensor,
    *,
    initial_state: Tensor | None,
    sequences: Sequences | None,
    backend: str,
    options: NewtonOptions,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ``cell`` over x ``[B, T, G, D]``.

    This serves :func:`newton_recurrence`, ``para_gru`` and ``para_lstm``. Returns all states ``[B,
    T, S, D]`` and the last ``[N, S, D]``. ``watch`` is shown the gate that keeps a state.
    """
    if x.ndim != 4:
        raise ValueError(f"{op}: the input is {tuple(x.shape)}, expected [B, T, gates, D]")
    batch_size, length, _, dim = x.shape
    check_shapes(op, {"parameters": (parameters, (parameters.shape[0], dim))})
    options.check(op)
    sequences = resolve_sequences(op, batch_size, length, x.device, sequences)
    state = resolve_state(
        op, initial_state, (sequences.count, cell.num_states, dim), x, "sequences, states, channels"
    )
    dtype = state.dtype
    rows, parameters = x.flatten(0, 1).to(dtype), parameters.to(dtype)
    fast = "newton" if sequences.max_length > 1 else "sequential"
    backend = choose_backend(op, backend, BACKENDS, "sequential", fast)
    begun, segment = state, crossing(sequences)
    if segment is not None:
        states, state = _on_segment(
            backend, cell, rows, parameters, state, sequences, segment, options
        )
    elif backend == "sequential":
        states, state = sequential_recurrence(cell, rows, parameters, state, sequences)
    else:
        states, state = Newton.apply(rows, parameters, state, cell, sequences, options)
    if watch is not None:
        show_decay(watch, cell, rows, parameters, states, begun, sequences)
    return states.to(x.dtype).view(batch_size, length, cell.num_states, dim), state


@torch.no_grad()
def show_decay(
    watch: Watch,
    cell: ElementwiseCell,
    rows: Tensor,
    parameters: Tensor,
    states: Tensor,
    initial_state: Tensor,
    sequences: Sequences,
) -> None:
    """Show ``log_decay`` of all steps, from the inputs ``[T, G, D]`` and states ``[T, S, D]``.

    Where sequences lie on several ranks, all of them must call.
    """
    before = one_step_before(states, initial_state, sequences).to(rows.dtype)
    log_decay = cell.log_keep(before.transpose(0, 1), rows.detach().transpose(0, 1), parameters)
    if log_decay is not None:
        watch({"log_decay": log_decay})


def _on_segment(
    backend: str,
    cell: ElementwiseCell,
    rows: Tensor,
    parameters: Tensor,
    state: Tensor,
    sequences: Sequences,
    segment: Segment,
    options: NewtonOptions,
) -> tuple[Tensor, Tensor]:
    """Run ``cell`` on a segment of a row; only the last round is reported."""
    pieces, last = pieces_alone(sequences), NewtonReport()

    def run(x: Tensor, parameters: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal last
        if backend == "sequential":
            return sequential_recurrence(cell, x, parameters, state, pieces)
        last = NewtonReport()
        reporting = dataclasses.replace(options, report=last)
        found: tuple[Tensor, Tensor] = Newton.apply(x, parameters, state, cell, pieces, reporting)
        return found

    found = segmented_recurrence(
        run, cell, rows, parameters, state, sequences, segment, options.tolerance_in(rows.dtype)
    )
    if options.report is not None:
        options.report.add(last.residual, last.fallbacks, last.sequences, last.iterations)
    return found
