"""S4D (arXiv 2206.11893): a diagonal time-invariant system for each channel.

    x' = A x + B u,  y = 2 Re C x + D u;   sampled: x_t = a x_{t-1} + b u_t with z = Delta A and
    zoh: a = e^z, b = B (a - 1) / A;    bilinear: a = (1 + z/2) / (1 - z/2), b = B Delta / (1 - z/2)

A of mode n is at first -1/2 + i pi n (``lin``), -1/2 + i (N / pi) (N / (2 n + 1) - 1) (``inv``) or
the n-th eigenvalue of HiPPO-LegS's normal part (``legs``, with its B, which else is 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.state_space import (
    LegSFrequencies,
    LegSInputs,
    StateSpaceConfig,
    StateSpaceMixer,
    pairs,
)
from pretrain.nn.parameters import constant
from pretrain.ops import lti
from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class S4DConfig(StateSpaceConfig):
    """Settings of S4D."""

    init: Literal["lin", "inv", "legs"] = setting("lin")
    """What A starts as: S4D-Lin, S4D-Inv or S4D-LegS."""
    discretization: Literal["zoh", "bilinear"] = setting("zoh")
    """How the system is sampled: with inputs held between samples, or by the bilinear rule."""


@register("s4d")
class S4D(StateSpaceMixer):
    """S4D, as a mixer."""

    config_class = S4DConfig
    matrices = 3
    card = MixerCard(
        "S4D",
        "x_t = a x_{t-1} + b u_t;  y_t = 2 Re c x_t + D u_t",
        "d N",
        "chunks",
        "arXiv 2206.11893",
        sharded="d",
    )

    @override
    def spectrum(self) -> dict[str, Any]:
        kind = self.config.init
        frequencies = LegSFrequencies() if kind == "legs" else Frequencies(kind)
        return {"A_log": constant(math.log(0.5)), "A_imag": frequencies}

    @override
    def input_init(self) -> Any:
        return LegSInputs() if self.config.init == "legs" else _ones

    @override
    def run(
        self, u: Tensor, sequences: Sequences | None, state: Tensor | None, *, final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        rule = self.config.discretization
        log_a, b = recomputed(
            discretized, self.decay(), self.A_imag, self.dt_log.exp(), self.B, rule
        )
        self.note(log_decay=log_a.real)
        return lti(
            u,
            log_a,
            b,
            pairs(self.C),
            initial_state=state,
            sequences=sequences,
            final_state=final_state,
            chunk_size=self.config.chunk_size,
        )


def discretized(
    decay: Tensor, frequency: Tensor, step: Tensor, b: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """Return log a and b of the sampled system, complex ``[d, M]``.

    ``decay`` and ``frequency`` ``[d, M]`` are A, ``step`` ``[d]`` is Delta, ``b`` ``[d, M, 2]``.
    """
    x, y = decay * step[:, None], frequency * step[:, None]
    inputs = pairs(b)
    if kind == "zoh":
        # e^z - 1, whose parts do not cancel where z is small.
        real = torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2).square()
        change = torch.complex(real, x.exp() * torch.sin(y))
        return torch.complex(x, y), inputs * change / torch.complex(decay, frequency)
    x, y = x / 2, y / 2
    below = (1 - x).square() + y.square()  # |1 - z/2|^2
    # |a| as far from 0 as can be told apart from it in what follows.
    growth = (4 * x / below).clamp_min(torch.finfo(x.dtype).eps - 1)
    log_a = torch.complex(torch.log1p(growth) / 2, torch.atan2(2 * y, 1 - x.square() - y.square()))
    return log_a, inputs * torch.complex((1 - x) / below, y / below) * step[:, None]


@dataclass(frozen=True)
class Frequencies:
    """Im A of S4D-Lin or S4D-Inv; a class, so that models can be pickled."""

    kind: str

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        n, size = torch.arange(shape[1], dtype=torch.float64), 2 * shape[1]
        found = math.pi * n if self.kind == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
        return found.float().expand(shape)


def _ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return ones, as pairs of a real and an imaginary part."""
    return torch.tensor([1.0, 0.0]).expand(shape)
