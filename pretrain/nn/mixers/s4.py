"""S4 (arXiv 2111.00396): a time-invariant system of a normal matrix less one of rank one.

    x' = A x + B u,  y = 2 Re C x + D u  with A = Lambda - P P*, over pairs of conjugates;
    bilinear: x_t = (1 - Delta A / 2)^-1 ((1 + Delta A / 2) x_{t-1} + Delta B u_t)

At first A and B are HiPPO-LegS's. P couples the modes, so the sampled matrix is a dense one for
each channel, which Woodbury's identity gives without a solve. Its powers up to a chunk's length
make the convolution inside chunks and the maps from state to state, once for all tokens; the paper
makes the convolution over a whole row from a generating function, and so has no states inside a row
and no packed documents. The trained C is the system's own, not the paper's C (1 - A^L), so that it
means the same at every length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.base import LayerContext, MixerCard, register
from pretrain.nn.mixers.parts import power_of_two
from pretrain.nn.mixers.state_space import (
    LegSFrequencies,
    LegSInputs,
    StateSpaceConfig,
    StateSpaceMixer,
    pairs,
)
from pretrain.nn.parameters import constant
from pretrain.ops import dense_lti
from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class S4Config(StateSpaceConfig):
    """Settings of S4; ``chunk_size`` is a power of two."""


@register("s4")
class S4(StateSpaceMixer):
    """S4, as a mixer."""

    config_class = S4Config
    matrices = 4
    P: nn.Parameter
    card = MixerCard(
        "S4",
        "x_t = A x_{t-1} + b u_t;  y_t = 2 Re c x_t + D u_t, A sampled from Lambda - P P*",
        "d N",
        "chunks",
        "arXiv 2111.00396",
        sharded="d",
    )

    def __init__(self, config: S4Config, context: LayerContext):
        super().__init__(config, context)
        shape = (self.channels, config.state_size // 2, 2)
        self.P = self.dynamics(shape, LegSInputs(0.5**0.5))

    @override
    def spectrum(self) -> dict[str, Any]:
        return {"A_log": constant(math.log(0.5)), "A_imag": LegSFrequencies()}

    @override
    def input_init(self) -> Any:
        return LegSInputs()

    @override
    def run(
        self, u: Tensor, sequences: Sequences | None, state: Tensor | None, *, final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        spectrum = torch.complex(self.decay(), self.A_imag)
        a, b = recomputed(sampled, spectrum, pairs(self.P), self.B, self.dt_log.exp())
        if self.watch is not None:  # the mean over eigenvalues of the logarithms of their sizes
            self.note(log_decay=torch.linalg.slogdet(a.detach())[1] / a.shape[-1])
        return dense_lti(
            u,
            a,
            b,
            2 * torch.stack([self.C[..., 0], -self.C[..., 1]], -1).flatten(1),
            initial_state=state,
            sequences=sequences,
            final_state=final_state,
            chunk_size=self.config.chunk_size,
        )

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        super().check(config, hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        over_chunk = 2 * config.state_size**2 // config.chunk_size  # of the state
        return super().flops_per_token(config, hidden_size, seq_len) + hidden_size * over_chunk

    @classmethod
    @override
    def flops_per_pass(cls, config: Any, hidden_size: int) -> int:
        # The powers of each channel's matrix, and what they read and write.
        size, chunk = config.state_size, config.chunk_size
        doublings = chunk.bit_length() - 1
        return hidden_size * size**2 * (2 + 4 * (chunk - 1) + 2 * size * doublings)


def sampled(spectrum: Tensor, p: Tensor, b: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sampled system's matrix ``[d, N, N]`` and input ``[d, N]`` in real numbers.

    ``spectrum`` and ``p`` are complex ``[d, N / 2]``, ``b`` is ``[d, N / 2, 2]``, ``step`` ``[d]``.
    A mode's real and imaginary part lie side by side, in which P P* is 2 p p^T.
    """
    half = step[:, None] / 2
    inverse = 1 / (1 - half * spectrum)  # of the normal part
    left = torch.view_as_real(inverse * p).flatten(1)
    right = torch.view_as_real(inverse.conj() * p).flatten(1)
    coupling = (torch.view_as_real(p).flatten(1) * left).sum(-1)
    scale = step / (1 + step * coupling)
    turns = torch.stack([inverse.real, -inverse.imag, inverse.imag, inverse.real], 1)
    blocks = torch.diag_embed(turns).unflatten(1, (2, 2))  # [d, 2, 2, N / 2, N / 2]
    whole = blocks.permute(0, 3, 1, 4, 2).flatten(3, 4).flatten(1, 2)
    whole = whole - (scale[:, None] * left)[:, :, None] * right[:, None]
    inputs = (whole * b.flatten(1)[:, None]).sum(-1) * step[:, None]
    # 1 + Delta A / 2 is 2 - (1 - Delta A / 2).
    return 2 * whole - torch.eye(whole.shape[-1], dtype=whole.dtype, device=whole.device), inputs
