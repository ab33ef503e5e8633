"""The classical recurrent cells, with head-wise memory mixing (FlashRNN, arXiv 2412.07752).

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

n' is at least 1 by induction, so the max(n', 1) of other implementations never binds; it is
omitted, for at its tie on a first step it would halve the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.shared.checkpointed_recurrence import States


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
    """A classical cell.

    Attributes:
        step: maps gate inputs ``[N, G, H, D]``, recurrent products and states to new states.
        gates: rows of x and of R h.
        biases: rows of the bias.
        states: names of the states, the output first.
        initial: what each state starts from.
        forget: the gate whose sigmoid is what is kept of a state; None: there is none.
        shown: other gates that are sigmoids, by name.
    """

    step: Callable[[Tensor, Tensor, States], States]
    gates: int
    biases: int
    states: tuple[str, ...]
    initial: tuple[float, ...]
    forget: int | None = None
    shown: tuple[tuple[str, int], ...] = ()


CELLS = {
    "elman": Cell(_elman, 1, 1, ("h",), (0.0,)),
    "gru": Cell(_gru, 3, 4, ("h",), (0.0,), 1, (("reset", 0),)),
    "lstm": Cell(_lstm, 4, 4, ("h", "c"), (0.0, 0.0), 1, (("input", 0), ("output", 3))),
    "slstm": Cell(
        _slstm, 4, 4, ("h", "c", "n", "m"), (0.0, 0.0, 0.0, -torch.inf), 1, (("output", 3),)
    ),
}
