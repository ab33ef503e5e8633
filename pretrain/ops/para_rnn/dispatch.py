"""ParaGRU and ParaLSTM: gated cells with diagonal recurrent weights (ParaRNN, arXiv 2510.21450).

para_gru    z = sigmoid(a_z h + u_z), r = sigmoid(a_r h + u_r), c = tanh(a_c r h + u_c),
            h' = (1 - z) h + z c
para_lstm   f = sigmoid(a_f h + c_f s + u_f), z = tanh(a_z h + u_z), s' = f s + (1 - f) z,
            o = sigmoid(a_o h + c_o s' + u_o), h' = o tanh(s')           (s: the cell state)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.data.sequences import Sequences, given_sequences
from pretrain.ops.across import crossing
from pretrain.ops.newton.cell import ElementwiseCell
from pretrain.ops.newton.dispatch import elementwise_recurrence, show_decay
from pretrain.ops.newton.options import NewtonOptions, NewtonReport
from pretrain.ops.over_heads import Ends, has_heads, over_heads
from pretrain.ops.para_rnn.cells import ParaGRU, ParaLSTM
from pretrain.ops.shared.arguments import (
    check_shapes,
    check_triton,
    choose_backend,
    resolve_sequences,
    resolve_state,
    triton_fits,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.watching import Watch

BACKENDS = ("auto", "sequential", "newton", "triton", "triton_shooting", "triton_steps")


@without_autocast
def para_gru(
    u: Tensor,
    a: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ParaGRU over sequences.

    u ``[B, T, 3, D]``: pre-activations of z, r, c; a ``[3, D]``: their recurrent weights; bias
    ``[3, D]``: added to u in float32 or wider.

    With ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are
    packed; ``initial_state`` is ``[N, D]``.

    backend: ``sequential`` is the definition, a plain loop; ``newton`` solves for all steps at
    once; ``triton_shooting`` solves for the starts of segments in one kernel, all of which are
    stepped through side by side, ``triton_steps`` steps through time in one, and both share the
    backward kernel; ``triton`` is the one of these that its instructions make the faster, the
    latter where thousands of channels (of all sequences together) keep the card busy anyway.
    ``auto`` takes ``triton`` on CUDA and ``newton`` elsewhere, ``sequential`` where every sequence
    is a single token. Newton steps are made until a sequence's residual, in shooting the shift of a
    segment's start that the next would make, is at most ``tolerance`` (default 1e-5, in float64
    1e-11), usually 3 (in float64 4). One that has not converged after ``iterations`` is computed
    step by step instead (in shooting what follows the start that still moves, to the end of the
    tile), and ``report`` counts it; without ``fallback`` it stays as it is then. ``watch`` is shown
    ``log_decay``, of the gate that keeps a state.

    Returns h of all steps ``[B, T, D]`` in u's dtype and the last, float32 or wider.
    Raises ValueError for shapes that do not fit and for an unknown backend.
    """
    weights = {"a": (a, 3)}
    state = None if initial_state is None else initial_state[:, None]
    output, final = _para_rnn(
        "para_gru",
        ParaGRU(),
        u,
        weights,
        bias,
        state,
        given_sequences("para_gru", sequences, cu_seqlens),
        backend,
        NewtonOptions(iterations, tolerance, fallback, report),
        watch,
    )
    return output, final[:, 0]


@without_autocast
def para_lstm(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    bias: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    iterations: int = 10,
    tolerance: float | None = None,
    fallback: bool = True,
    report: NewtonReport | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, Tensor]:
    """Run ParaLSTM over sequences.

    u ``[B, T, 3, D]``: pre-activations of f, o, z; a ``[3, D]``: their recurrent weights; c
    ``[2, D]``: the peepholes of f and o. States are ``[N, 2, D]``: cell state, then h. All else as
    in :func:`para_gru`, and so is the output.
    """
    weights = {"a": (a, 3), "c": (c, 2)}
    return _para_rnn(
        "para_lstm",
        ParaLSTM(),
        u,
        weights,
        bias,
        initial_state,
        given_sequences("para_lstm", sequences, cu_seqlens),
        backend,
        NewtonOptions(iterations, tolerance, fallback, report),
        watch,
    )


def _para_rnn(
    op: str,
    cell: ElementwiseCell,
    u: Tensor,
    weights: dict[str, tuple[Tensor, int]],
    bias: Tensor | None,
    initial_state: Tensor | None,
    sequences: Sequences | None,
    backend: str,
    options: NewtonOptions,
    watch: Watch | None,
) -> tuple[Tensor, Tensor]:
    """Return the output ``[B, T, D]`` and the states ``[N, S, D]``."""
    dim = u.shape[-1]
    check_shapes(
        op,
        {
            "u": (u, (*u.shape[:2], 3, dim)),
            "bias": (bias, (3, dim)),
            **{name: (tensor, (rows, dim)) for name, (tensor, rows) in weights.items()},
        },
    )
    batch_size, length = u.shape[:2]
    wide = torch.promote_types(u.dtype, torch.float32)
    parameters = torch.cat([tensor.to(wide) for tensor, _ in weights.values()])
    if backend == "auto" and triton_fits(u):
        longest = resolve_sequences(op, batch_size, length, u.device, sequences).max_length
        fast = "triton" if longest > 1 else "sequential"
        backend = choose_backend(op, backend, BACKENDS, "sequential", fast)
    if not backend.startswith("triton"):
        choose_backend(op, backend, BACKENDS, "sequential", "newton")
        states, final = elementwise_recurrence(
            op,
            cell,
            u if bias is None else u.to(wide) + bias.to(wide),
            parameters,
            initial_state=initial_state,
            sequences=sequences,
            backend=backend,
            options=options,
            watch=watch,
        )
        return states[:, :, -1].to(u.dtype), final

    choose_backend(op, backend, BACKENDS, "sequential", "triton")
    check_triton(op, u)
    from pretrain.ops.para_rnn.kernels import ParaRNN, steps_are_faster

    options.check(op)
    sequences = resolve_sequences(op, batch_size, length, u.device, sequences)
    initial_state = resolve_state(
        op, initial_state, (sequences.count, cell.num_states, dim), u, "sequences, states, channels"
    )
    if crossing(sequences) is not None:

        def whole(
            tensors: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, channels: slice
        ) -> tuple[Tensor, Ends]:
            output, end = _para_rnn(
                op,
                cell,
                tensors[0].transpose(2, 3),
                {name: (tensor[:, channels], rows) for name, (tensor, rows) in weights.items()},
                None if bias is None else bias[:, channels],
                begun[0].transpose(1, 2),
                row,
                backend,
                options,
                watch if has_heads(sequences, dim) else None,
            )
            return output, [(end.transpose(1, 2), [1] * row.count)]

        # Kernels take whole sequences, and channels never meet: ranks have some of them.
        output, (end,) = over_heads(
            sequences, whole, [u.transpose(2, 3)], dim, [initial_state.transpose(1, 2)]
        )
        return output, end.transpose(1, 2)
    bias = parameters.new_zeros(3, dim) if bias is None else bias.to(wide)
    kept: list[Tensor] | None = None if watch is None else []
    output, final, residuals, passes, failures = ParaRNN.apply(
        op,
        u.flatten(0, 1),
        torch.cat([parameters, bias]),
        initial_state,
        sequences,
        options.iterations,
        options.tolerance_in(wide),
        options.fallback,
        steps_are_faster(op, sequences, dim) if backend == "triton" else backend == "triton_steps",
        kept,
    )
    if watch is not None and kept:
        inputs = u.flatten(0, 1) + bias
        show_decay(watch, cell, inputs, parameters, kept[0], initial_state, sequences)
    if options.report is not None and len(residuals) and not u.is_meta:
        options.report.add(residuals.amax(), failures.sum(), sequences.count, passes.amax())
    return output.view(batch_size, length, dim), final
