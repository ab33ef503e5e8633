"""Classical recurrent cells with head-wise memory mixing (FlashRNN, arXiv 2412.07752).

Every head has its own recurrent matrix; heads never meet. With r = R h_{t-1} per head:

    elman   h' = tanh(x + r)
    gru     (reset, update, new): s = sigmoid(x_s + r_s), u = sigmoid(x_u + r_u),
            n = tanh(x_n + b_n + s (r_n + b_r)), h' = u h + (1 - u) n          (torch.nn.GRU's form)
    lstm    (input, forget, cell, output): c' = sigmoid(f) c + sigmoid(i) tanh(z),
            h' = sigmoid(o) tanh(c')
    slstm   the same gates with an exponential input gate, a normaliser n and a stabiliser m (xLSTM,
            arXiv 2405.04517): m' = max(i, m + log sigmoid(f)), i' = exp(i - m'),
            f' = exp(m + log sigmoid(f) - m'), c' = f' c + i' tanh(z), n' = f' n + i',
            h' = sigmoid(o) c' / n'

n' is at least 1 by induction, so the max(n', 1) of other implementations never binds; it is left
out, for at its tie on a first step it would halve the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.m2rnn.dispatch import clip_gradient
from pretrain.ops.shared.arguments import (
    check_shapes,
    check_triton,
    choose_backend,
    resolve_sequences,
    sequence_rows,
    triton_fits,
)
from pretrain.ops.shared.checkpointed_recurrence import (
    States,
    Steps,
    checkpointed_recurrence,
    previous_rows,
)

BACKENDS = ("auto", "recurrent", "checkpointed", "triton")
# Channels of a head whose recurrent matrices fit a multiprocessor, by the bytes of a number.
_WIDEST_ON_CHIP = {2: 128, 4: 64, 8: 32}


def _elman(x: Tensor, r: Tensor, states: States) -> States:
    return (torch.tanh(x[:, 0] + r[:, 0]),)


def _gru(x: Tensor, r: Tensor, states: States) -> States:
    reset, update = torch.sigmoid(x[:, :2] + r[:, :2]).unbind(1)
    new = torch.tanh(x[:, 2] + reset * (r[:, 2] + x[:, 3]))
    return (torch.lerp(new, states[0], update),)


def _lstm(x: Tensor, r: Tensor, states: States) -> States:
    i, f, z, o = (x + r).unbind(1)
    cell = torch.sigmoid(f) * states[1] + torch.sigmoid(i) * torch.tanh(z)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _slstm(x: Tensor, r: Tensor, states: States) -> States:
    _, cell, normaliser, stabiliser = states
    i, f, z, o = (x + r).unbind(1)
    kept = F.logsigmoid(f) + stabiliser
    m = torch.maximum(i, kept)
    write, keep = torch.exp(i - m), torch.exp(kept - m)
    cell, normaliser = keep * cell + write * torch.tanh(z), keep * normaliser + write
    return torch.sigmoid(o) * cell / normaliser, cell, normaliser, m


@dataclass(frozen=True)
class Cell:
    """A cell's step from gate inputs ``[N, G, H, D]`` and recurrent products to new states.

    gates: rows of x and of R h; biases: rows of the bias; states: their names, the output first;
    initial: what each state starts from.
    """

    step: Callable[[Tensor, Tensor, States], States]
    gates: int
    biases: int
    states: tuple[str, ...]
    initial: tuple[float, ...]


CELLS = {
    "elman": Cell(_elman, 1, 1, ("h",), (0.0,)),
    "gru": Cell(_gru, 3, 4, ("h",), (0.0,)),
    "lstm": Cell(_lstm, 4, 4, ("h", "c"), (0.0, 0.0)),
    "slstm": Cell(_slstm, 4, 4, ("h", "c", "n", "m"), (0.0, 0.0, 0.0, -torch.inf)),
}


def rnn(
    x: Tensor,
    recurrent_weight: Tensor,
    bias: Tensor | None,
    *,
    cell: str = "lstm",
    state_grad_clip: float | None = None,
    initial_state: States | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
    checkpoint_every: int | None = None,
) -> tuple[Tensor, States]:
    """x ``[B, T, G, H, D]``: the gates' inputs; recurrent_weight ``[H, D, G, D]`` (from, gate, to);
    bias ``[G, H, D]`` or None, for ``gru`` ``[4, H, D]``: reset, update, new, and the one that the
    reset gate multiplies. G and the gates' order are the module's.

    ``state_grad_clip`` bounds every element of the gradient carried back from step to step. With
    ``cu_seqlens`` (``[N + 1]``) B must be 1 and N sequences are packed; ``initial_state`` is one
    ``[N, H, D]`` for each of the cell's states (``CELLS``), h first.

    backend: ``recurrent`` is the definition, a plain loop through autograd; ``checkpointed`` the
    same loop with a backward pass that keeps every ``checkpoint_every``-th step; ``triton`` one
    kernel each way, for heads of up to 128 channels (float32: 64), which keeps every step's states.
    ``auto`` takes ``triton`` on CUDA where it can, ``checkpointed`` elsewhere.

    Returns h of all steps ``[B, T, H, D]`` in x's dtype and the final states, float32 or wider.
    Raises ValueError for shapes that do not fit, an unknown cell and an unknown backend.
    """
    if cell not in CELLS:
        raise ValueError(f"rnn: cell is '{cell}', expected one of {tuple(CELLS)}")
    on_chip = triton_fits(x, 160 * 1024) and x.shape[-1] <= _WIDEST_ON_CHIP[x.element_size()]
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
    cu_seqlens, lengths = resolve_sequences("rnn", batch_size, length, cu_seqlens, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    shape = (len(lengths), num_heads, dim)
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
    if backend == "triton":
        return _in_kernels(x, recurrent_weight, bias, cell, states, cu_seqlens, state_grad_clip)
    rows = x.flatten(0, 1).to(dtype)
    if kind.biases > kind.gates:
        rows = F.pad(rows, (0, 0, 0, 0, 0, kind.biases - kind.gates))
    if bias is not None:
        rows = rows + bias.to(dtype)
    weight = recurrent_weight.flatten(2).to(dtype)
    if backend == "recurrent":
        output, states = _recurrent(kind, rows, weight, states, lengths, state_grad_clip)
    else:
        output, states = checkpointed_recurrence(
            _Classical(kind, state_grad_clip),
            [rows],
            [weight],
            states,
            cu_seqlens,
            checkpoint_every,
        )
    return output.to(x.dtype).view(batch_size, length, num_heads, dim), states


def _in_kernels(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    cell: str,
    states: States,
    cu_seqlens: Tensor,
    state_grad_clip: float | None,
) -> tuple[Tensor, States]:
    check_triton("rnn", x)
    from pretrain.ops.rnn.kernels import ClassicalRNN

    most = _WIDEST_ON_CHIP[x.element_size()]
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
        cu_seqlens,
        state_grad_clip,
        torch.is_grad_enabled(),
    )
    return output.view(*x.shape[:2], *x.shape[3:]), final.unbind(0)


def _product(h: Tensor, weight: Tensor) -> Tensor:
    """h ``[N, H, D]``, weight ``[H, D, G D]`` to ``[N, G, H, D]``."""
    product = torch.bmm(h.transpose(0, 1), weight)
    return product.unflatten(-1, (-1, h.shape[-1])).permute(1, 2, 0, 3)


def _recurrent(
    kind: Cell,
    rows: Tensor,
    weight: Tensor,
    initial: States,
    lengths: list[int],
    state_grad_clip: float | None,
) -> tuple[Tensor, States]:
    tokens, outputs, finals = rows.unbind(0), [], []
    for index, places in enumerate(sequence_rows(lengths)):
        states = tuple(s[index : index + 1] for s in initial)
        for t in places:
            states = kind.step(tokens[t][None], _product(states[0], weight), states)
            outputs.append(states[0][0])
            states = tuple(clip_gradient(s, state_grad_clip) for s in states)
        finals.append(states)
    output = torch.stack(outputs) if outputs else initial[0].new_zeros(0, *initial[0].shape[1:])
    if not finals:
        return output, initial
    return output, tuple(torch.cat(s) for s in zip(*finals, strict=True))


class _Classical:
    """rows: x with its biases; parameters: the recurrent weight ``[H, D, G D]``."""

    def __init__(self, kind: Cell, state_grad_clip: float | None):
        self._kind, self._clip = kind, state_grad_clip

    def forward(
        self, rows: Sequence[Tensor], parameters: Sequence[Tensor], states: States, steps: Steps
    ) -> tuple[Tensor, States]:
        (x,), (weight,) = rows, parameters
        output = states[0].new_empty(x.shape[0], *states[0].shape[1:])
        final, running = tuple(s.clone() for s in states), states
        for first, count in steps:
            running = _shrink(final, running, count)
            part = slice(first, first + count)
            running = self._kind.step(x[part], _product(running[0], weight), running)
            output[part] = running[0]
        _shrink(final, running, 0)
        return output, final

    def backward(
        self,
        rows: Sequence[Tensor],
        parameters: Sequence[Tensor],
        states: States,
        steps: Steps,
        d_output: Tensor,
        d_states: States,
    ) -> tuple[Sequence[Tensor], Sequence[Tensor], States]:
        (x,), (weight,) = rows, parameters
        # Each step's pointwise part becomes a small graph of its own; the matrix products are done
        # by hand, those of the weight's gradient for the whole block at once.
        graphs, running = [], states
        history = states[0].new_empty(len(states[0]) + x.shape[0], *states[0].shape[1:])
        history[: len(states[0])] = states[0]
        for first, count in steps:
            with torch.no_grad():
                product = _product(running[0][:count], weight)
            leaves = [
                t.detach().requires_grad_()
                for t in (x[first : first + count], product, *(s[:count] for s in running))
            ]
            with torch.enable_grad():
                new = self._kind.step(leaves[0], leaves[1], tuple(leaves[2:]))
            graphs.append((leaves, new))
            running = tuple(s.detach() for s in new)
            history[len(states[0]) + first :][:count] = running[0]

        d_x, back = torch.empty_like(x), weight.mT
        d_products = weight.new_empty(x.shape[0], weight.shape[0], weight.shape[2])
        for (first, count), (leaves, new) in zip(reversed(steps), reversed(graphs), strict=True):
            part = slice(first, first + count)
            carried = [d[:count] for d in d_states]
            if self._clip is not None:
                carried = [d.clamp_(-self._clip, self._clip) for d in carried]
            carried[0] = carried[0] + d_output[part]
            d_x[part], d_product, *d_before = torch.autograd.grad(
                new, leaves, carried, allow_unused=True, materialize_grads=True
            )
            d_products[part] = d_product.permute(0, 2, 1, 3).flatten(2)
            through = torch.bmm(d_products[part].transpose(0, 1), back).transpose(0, 1)
            d_before[0] = d_before[0] + through
            for whole, new_part in zip(d_states, d_before, strict=True):
                whole[:count] = new_part
        previous = previous_rows(history, len(states[0]), steps)
        d_weight = previous.permute(1, 2, 0) @ d_products.transpose(0, 1)
        return (d_x,), (d_weight,), d_states


def _shrink(final: States, running: States, count: int) -> States:
    """Store the states of sequences that are over; the first ``count`` go on."""
    size = len(running[0])
    if count < size:
        for whole, part in zip(final, running, strict=True):
            whole[count:size] = part[count:]
    return tuple(s[:count] for s in running)
