"""Classical recurrent cells with head-wise memory mixing: which implementation runs.

Their equations are in :mod:`pretrain.ops.rnn.cells`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.data.sequences import Sequences
from pretrain.ops.across import crossing
from pretrain.ops.over_heads import Ends, has_heads, over_heads
from pretrain.ops.rnn.cells import CELLS, Cell
from pretrain.ops.rnn.checkpointed import CheckpointedRNN
from pretrain.ops.rnn.definition import recurrent_rnn
from pretrain.ops.shared.arguments import (
    check_shapes,
    check_triton,
    choose_backend,
    resolve_sequences,
    triton_fits,
)
from pretrain.ops.shared.autocast import without_autocast
from pretrain.ops.shared.checkpointed_recurrence import (
    States,
    checkpointed_recurrence,
)
from pretrain.ops.shared.watching import Watch, one_step_before

BACKENDS = ("auto", "recurrent", "checkpointed", "triton")
# Channels of a head whose recurrent matrices can be read again for every token, by the bytes of a
# number; of wider ones products by all of the card are faster.
_WIDEST = {2: 512, 4: 256, 8: 256}


@without_autocast
def rnn(
    x: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor | None,
    *,
    cell: str = "lstm",
    state_grad_clip: float | None = None,
    initial_state: States | None = None,
    sequences: Sequences | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    checkpoint_every: int | None = None,
    watch: Watch | None = None,
) -> tuple[Tensor, States]:
    """Run a classical cell over sequences.

    x ``[B, T, G, H, D]``: the gates' inputs; recurrent_weight ``[H, D, G, D]`` (from, gate, to);
    bias ``[G, H, D]`` or None, for ``gru`` ``[4, H, D]``: reset, update, new, and the one that the
    reset gate multiplies. G and the gates' order are the module's.

    ``state_grad_clip`` bounds every element of the gradient carried back from step to step. With
    ``sequences`` (or their tensor ``cu_seqlens`` ``[N + 1]``) B must be 1 and N sequences are
    packed; ``initial_state`` is one ``[N, H, D]`` for each of the cell's states (``CELLS``), h
    first.

    backend: ``recurrent`` is the definition, a plain loop through autograd; ``checkpointed`` the
    same loop with a backward pass that keeps every ``checkpoint_every``-th step; ``triton`` one
    kernel each way, for heads of up to 512 channels (float32: 256), which keeps every step's
    states; on chip are the matrices of up to 128 channels (float32: 64).
    ``auto`` takes ``triton`` on CUDA where it can, ``checkpointed`` elsewhere.

    ``watch`` is shown the cell's gates: ``log_decay`` of the one that keeps a state, and others.
    Returns h of all steps ``[B, T, H, D]`` in x's dtype and the final states, float32 or wider.
    Raises ValueError for shapes that do not fit, an unknown cell and an unknown backend.
    """
    if cell not in CELLS:
        raise ValueError(f"rnn: cell is '{cell}', expected one of {tuple(CELLS)}")
    on_chip = triton_fits(x, 160 * 1024) and x.shape[-1] <= _WIDEST[x.element_size()]
    fast = "triton" if on_chip else "checkpointed"
    backend = choose_backend("rnn", backend, BACKENDS, "recurrent", fast)
    kind = CELLS[cell]
    if x.ndim != 5:
        raise ValueError(f"rnn: x is {tuple(x.shape)}, expected [B, T, gates, H, D]")
    batch_size, length, _, num_heads, dim = x.shape
    check_shapes(
        "rnn",
        {
            "x": (x, (batch_size, length, kind.gates, num_heads, dim)),
            "recurrent_weight": (recurrent_weight, (num_heads, dim, kind.gates, dim)),
            "bias": (bias, (kind.biases, num_heads, dim)),
        },
    )
    if state_grad_clip is not None and state_grad_clip <= 0:
        raise ValueError(f"rnn: state_grad_clip is {state_grad_clip}, expected more than 0")
    sequences = resolve_sequences("rnn", batch_size, length, x.device, sequences, cu_seqlens)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (sequences.count, num_heads, dim)
    if initial_state is None:
        states = tuple(x.new_full(shape, value, dtype=dtype) for value in kind.initial)
    else:
        if len(initial_state) != len(kind.states):
            raise ValueError(
                f"rnn: initial_state has {len(initial_state)} tensors, expected {kind.states}"
            )
        check_shapes(
            "rnn",
            {
                f"initial_state {n}": (s, shape)
                for n, s in zip(kind.states, initial_state, strict=True)
            },
        )
        states = tuple(s.to(dtype) for s in initial_state)
    if crossing(sequences) is not None:

        def whole(
            tensors: Sequence[Tensor], begun: Sequence[Tensor], row: Sequences, heads: slice
        ) -> tuple[Tensor, Ends]:
            output, ends = rnn(
                tensors[0].transpose(2, 3),
                recurrent_weight[heads],
                None if bias is None else bias[:, heads],
                initial_state=tuple(begun),
                sequences=row,
                **settings,
            )
            return output, [(state, [1] * row.count) for state in ends]

        settings: dict[str, Any] = {
            "watch": watch if has_heads(sequences, num_heads) else None,
            "cell": cell,
            "state_grad_clip": state_grad_clip,
            "backend": backend,
            "checkpoint_every": checkpoint_every,
        }
        output, ended = over_heads(sequences, whole, [x.transpose(2, 3)], num_heads, states)
        return output, tuple(ended)
    begun = states[0]
    if backend == "triton":
        y, states = _in_kernels(x, recurrent_weight, bias, cell, states, sequences, state_grad_clip)
        if watch is not None:
            watch(_gates(kind, x, recurrent_weight, bias, y, begun, sequences))
        return y, states
    rows = x.flatten(0, 1).to(dtype)
    if kind.biases > kind.gates:
        rows = F.pad(rows, (0, 0, 0, 0, 0, kind.biases - kind.gates))
    if bias is not None:
        rows = rows + bias.to(dtype)
    weight = recurrent_weight.flatten(2).to(dtype)
    if backend == "recurrent":
        output, states = recurrent_rnn(kind, rows, weight, states, sequences, state_grad_clip)
    else:
        output, states = checkpointed_recurrence(
            CheckpointedRNN(kind, state_grad_clip),
            [rows],
            [weight],
            states,
            sequences,
            checkpoint_every,
        )
    y = output.to(x.dtype).view(batch_size, length, num_heads, dim)
    if watch is not None:
        watch(_gates(kind, x, recurrent_weight, bias, y, begun, sequences))
    return y, states


@torch.no_grad()
def _gates(
    kind: Cell,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    initial: Tensor,
    sequences: Sequences,
) -> dict[str, Tensor]:
    """Return a cell's gates, which it keeps to itself, from the h ``[B, T, H, D]`` that it gave."""
    before = one_step_before(y.flatten(0, 1), initial, sequences).to(initial.dtype)

    def gate(row: int) -> Tensor:
        product = torch.einsum("thd,hde->the", before, weight[:, :, row].to(initial.dtype))
        found = product + x[:, :, row].flatten(0, 1)
        return found if bias is None else found + bias[row]

    gates = {name: torch.sigmoid(gate(row)) for name, row in kind.shown}
    if kind.forget is not None:
        gates["log_decay"] = F.logsigmoid(gate(kind.forget))
    return gates


def _in_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cell: str,
    states: States,
    sequences: Sequences,
    state_grad_clip: float | None,
) -> tuple[Tensor, States]:
    check_triton("rnn", x)
    from pretrain.ops.rnn.kernels import ClassicalRNN

    most = _WIDEST[x.element_size()]
    if x.shape[-1] > most:
        raise ValueError(
            f"rnn: heads have {x.shape[-1]} channels, expected at most {most} for triton "
            f"in {x.dtype}"
        )
    if bias is None:
        bias = states[0].new_zeros(CELLS[cell].biases, *x.shape[3:])
    output, final = ClassicalRNN.apply(
        cell,
        x.flatten(0, 1),
        weight,
        bias,
        torch.stack(states),
        sequences,
        state_grad_clip,
        torch.is_grad_enabled(),
    )
    return output.view(*x.shape[:2], *x.shape[3:]), final.unbind(0)
