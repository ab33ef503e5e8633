"""What the parameters of RWKV-7 start from, as published (BlinkDL/RWKV-LM, RWKV-v7).

Classes, so that models can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pretrain.nn.linear import ColumnParallelLinear
from pretrain.nn.parameters import change_info
from pretrain.parallel.context import ParallelContext

MIX_EXPONENTS = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


@dataclass(frozen=True)
class Orthogonal:
    """Draw orthonormal rows or columns, times ``gain``."""

    gain: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return torch.nn.init.orthogonal_(torch.empty(shape), self.gain, generator)


def start_orthogonal(
    layer: ColumnParallelLinear, parallel: ParallelContext, gain: float
) -> ColumnParallelLinear:
    """Let a layer start from an orthogonal matrix times ``gain``.

    Its norm is the same at every width, as is wanted, where that of a Gaussian grows: what
    maximal-update parametrization takes from it by its role, or would have to add, is undone.
    """
    change_info(layer.weight, init=Orthogonal(gain * parallel.width**0.5))
    return layer


@dataclass(frozen=True)
class Mix:
    """Set the shares of the token before, which fall over channels.

    Attributes:
        exponent: How fast they do: less with depth.
    """

    exponent: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return 1 - (torch.arange(shape[0]) / shape[0]) ** self.exponent


@dataclass(frozen=True)
class ByChannel:
    """Set a vector over all heads' channels.

    Attributes:
        kind: Which: the bias of the decay, that of a, what scales erase keys, or the bias of the
            share of the first layer's values.
        head_dim: Channels of a head.
        depth: Of the decay, 0 in the first layer and 1 in the last.
    """

    kind: Literal["decay", "rate", "erase", "value"]
    head_dim: int
    depth: float = 0.0

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        channel = torch.arange(shape[0])
        position = channel / max(shape[0] - 1, 1)
        middle = (self.head_dim - 1) / 2
        within = (channel % self.head_dim - middle) / max(middle, 0.5)  # in the head, from -1 to 1
        within = within * within.abs()
        if self.kind == "decay":
            return -5.5 + 6 * position ** (1 + self.depth**0.3) + 2.5 * within
        if self.kind == "rate":
            return -0.19 + 0.3 * within + 0.4 * (position - 0.5)
        start, slope = (0.71, -0.1) if self.kind == "erase" else (0.73, -0.4)
        return start + slope * (position - 0.5)
