"""Cells whose Jacobian couples at most the states of one channel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Linear = tuple[Tensor, Tensor, Any]


class ElementwiseCell:
    """A cell to be solved by Newton's method.

    ``step(h [S, ..., D], x [G, ..., D], parameters [P, D]) -> h' [S, ..., D]`` is elementwise over
    everything but S, G and P. Derivatives are taken by ``torch.func`` unless a subclass overrides
    them.
    """

    # Whether linearize takes so few operations that positions may be stepped through one by one, as
    # shooting does; those of torch.func take too many.
    shooting = False
    bounded = False  # whether states stay within about 1, so that residuals need no scale

    def __init__(self, step: Callable[[Tensor, Tensor, Tensor], Tensor], num_states: int = 1):
        self.step, self.num_states = step, num_states

    def log_keep(self, h: Tensor, x: Tensor, parameters: Tensor) -> Tensor | None:
        """Return the logarithm of the gate that keeps a state, None where there is none."""
        return None

    def linearize(self, h: Tensor, x: Tensor, parameters: Tensor) -> Linear:
        """Return f, its Jacobian ``[S, S, ..., D]`` (to, from), and what :meth:`vjp` needs."""
        columns = []
        for s in range(self.num_states):
            tangent = torch.zeros_like(h)
            tangent[s] = 1
            pair: Any = torch.func.jvp(lambda t: self.step(t, x, parameters), (h,), (tangent,))
            value, column = pair
            columns.append(column)
        return value, torch.stack(columns, 1), (h, x)

    def vjp(self, known: Any, parameters: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of x and the parameters where f's is ``cotangent``."""
        h, x = known
        pair: Any = torch.func.vjp(lambda a, p: self.step(h, a, p), x, parameters)
        d_x, d_parameters = pair[1](cotangent)
        return d_x, d_parameters
