"""What a memory is trained by: its loss and its retention, as both forms of the op use them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTHING = 1e-6  # added to e^2 where |e|^p has no second derivative at 0, or a large one
_LEAST_NORM = 1e-2  # which A's norm never falls below, as W grows without bound with its inverse
_TINY = 1e-30
_NORM_EPS = 1e-5

Matrices = tuple[Tensor, ...]


@dataclass
class MirasState:
    """The state of a memory after some tokens of N sequences.

    It says by how much the memory differs from the one that documents begin with, so that before
    any token it is zeros.

    Attributes:
        start: One ``[N, H, in, out]`` for each of the memory's matrices, at the start of the open
            chunk, where gradients are taken.
        now: The same, after the last token.
        seen: ``[N]`` int64, tokens so far.
    """

    start: Matrices
    now: Matrices
    seen: Tensor


@dataclass(frozen=True)
class MirasRule:
    """The loss and the retention of a memory.

    Attributes:
        loss: ``l2``, ``lp`` or ``huber``.
        p: The exponent of ``lp``.
        retention: How W is made of A, the accumulated matrix: ``norm`` scales it, ``mirror`` is the
            mirror map of the same norm, ``softmax`` is over the inputs of a matrix.
        norm: The exponent q of the first two; 2 leaves A as it is.
    """

    loss: Literal["l2", "lp", "huber"] = "l2"
    p: float = 3.0
    retention: Literal["norm", "mirror", "softmax"] = "norm"
    norm: float = 2.0

    @property
    def scales(self) -> bool:
        """Return whether W is A times a number that differs from 1."""
        return self.retention == "norm" and self.norm != 2

    @property
    def elementwise(self) -> bool:
        """Return whether W is no multiple of A, so that a read needs W itself."""
        return self.retention == "softmax" or (self.retention == "mirror" and self.norm != 2)

    def weights(self, a: Tensor) -> Tensor:
        """Return W of A ``[..., in, out]``."""
        if self.retention == "softmax":
            return a.softmax(-2)
        if self.elementwise:
            return a * (a.square() + _TINY).pow((self.norm - 2) / 2) * self.scale(a)
        return a * self.scale(a) if self.scales else a

    def scale(self, a: Tensor) -> Tensor:
        """Return ``||A||_q^(2 - q)``, ``[..., 1, 1]``."""
        largest = a.detach().abs().amax((-2, -1), keepdim=True).clamp_min(_LEAST_NORM)
        powers = (a / largest).abs().pow(self.norm).sum((-2, -1), keepdim=True)
        return (largest * powers.clamp_min(1.0).pow(1 / self.norm)).pow(2 - self.norm)

    def kept(self, a: Tensor) -> Tensor:
        """Return A as a chunk leaves it: the logarithm of W for ``softmax``, else as it is."""
        return a.log_softmax(-2) if self.retention == "softmax" else a

    def of_error(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """Return the loss of an error, summed over everything."""
        if self.loss == "huber":
            assert threshold is not None
            size = error.abs()
            far = threshold * size - threshold.square() / 2
            return torch.where(size <= threshold, error.square() / 2, far).sum()
        p, smoothing = self._power()
        return (error.square() + smoothing).pow(p / 2).sum()

    def slope(self, error: Tensor, threshold: Tensor | None) -> Tensor:
        """Return the derivative of the loss, element by element."""
        if self.loss == "huber":
            assert threshold is not None
            return torch.minimum(torch.maximum(error, -threshold), threshold)
        p, smoothing = self._power()
        return p * error * (error.square() + smoothing).pow((p - 2) / 2)

    def _power(self) -> tuple[float, float]:
        p = 2.0 if self.loss == "l2" else self.p
        return p, 0.0 if p % 2 == 0 else _SMOOTHING


def remember(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """Return what a memory of one or two matrices makes of x ``[..., tokens, K]``."""
    if len(matrices) == 1:
        return x @ matrices[0]
    return x + normalized(F.gelu(x @ matrices[0]) @ matrices[1])


def normalized(y: Tensor) -> Tensor:
    """Return y without its mean and with unit variance over the last axis."""
    return F.layer_norm(y, y.shape[-1:], eps=_NORM_EPS)


def normalized_backward(y: Tensor, d_normalized: Tensor) -> Tensor:
    """Return the gradient of y where ``normalized(y)`` has the given one."""
    centered = y - y.mean(-1, keepdim=True)
    rate = torch.rsqrt(centered.square().mean(-1, keepdim=True) + _NORM_EPS)
    unit = centered * rate
    along = (d_normalized * unit).mean(-1, keepdim=True)
    return rate * (d_normalized - d_normalized.mean(-1, keepdim=True) - unit * along)


def gelu_slope(x: Tensor) -> Tensor:
    """Return the derivative of GELU."""
    density = torch.exp(-x.square() / 2) * 0.3989422804014327  # (2 pi)^-1/2
    return (1 + torch.erf(x * 0.7071067811865476)) / 2 + x * density
