"""RetNet's multi-scale retention (arXiv 2307.08621): a fixed decay per head, rotary positions.

Head h of H decays by 1 - 2^(-5-h).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.mixers.base import MixerCard, State, accumulation_dtype, register
from pretrain.nn.mixers.linear_family import LinearFamilyConfig, LinearFamilyMixer
from pretrain.ops import apply_rotary, rotary_embedding


@dataclass(frozen=True)
class RetNetConfig(LinearFamilyConfig):
    """Settings of RetNet."""

    expand_v: float = setting(2.0, above=0)
    """Width V of a value as a multiple of a key's."""
    rope_theta: float | None = setting(10_000.0, above=0)
    """Base of rotary positions; null: no positions."""


@functools.cache
def _decays(first: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the log-decays of some heads, made once: copying them to a GPU would make it wait."""
    logs = [math.log1p(-(2.0 ** -(5 + first + h))) for h in range(count)]
    with torch.inference_mode(False):
        return torch.tensor(logs, dtype=dtype, device=device)


@register("retnet")
class RetNet(LinearFamilyMixer):
    """RetNet, as a mixer.

    Its state is S ``[N, H, K, V]`` in float32, and the number of tokens seen.
    """

    config_class = RetNetConfig
    card = MixerCard(
        "RetNet",
        "S_t = a_h S_{t-1} + k_t^T v_t;  o_t = q_t S_t;  a_h = 1 - 2^(-5-h)",
        "H K V",
        "chunks",
        "arXiv 2307.08621",
    )

    def log_decay(self, x: Tensor) -> Tensor:
        """Return the same decays at every token."""
        first = self.parallel.tensor_rank * self.num_heads
        decay = _decays(first, self.num_heads, accumulation_dtype(x.dtype), x.device)
        return decay.expand(x.shape[1], x.shape[0], -1)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences | None,
        state: State | None,
        new_state: State,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate q and k by their positions, counted on from the state."""
        batch_size, length = q.shape[:2]
        if sequences is None:
            positions = torch.arange(length, device=q.device).expand(batch_size, length)
            lengths = torch.full((batch_size,), length, device=q.device)
        else:
            positions, lengths = sequences.positions[None], sequences.sizes
        new_state["seen"] = lengths if sequences is None else sequences.sizes_so_far
        if state is not None:
            positions = positions + torch.repeat_interleave(state["seen"], lengths).view(
                positions.shape
            )
            new_state["seen"] = new_state["seen"] + state["seen"]
        if self.config.rope_theta is not None:
            cos, sin = rotary_embedding(positions, self.key_dim, self.config.rope_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        return q, k, v

    @override
    def init_state(self, batch_size: int) -> State:
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.parallel.device)
        return {**super().init_state(batch_size), "seen": seen}

    @classmethod
    @override
    def check(cls, config: RetNetConfig, hidden_size: int) -> None:
        super().check(config, hidden_size)
        key_dim = config.head_dim
        if config.rope_theta is not None and key_dim % 2:
            raise ValueError(f"head_dim is {key_dim}, expected an even number for rotary positions")
