"""Gated DeltaNet-2: a delta rule that erases and writes by gates per channel.

As in Kimi delta attention, with b = sigmoid(W_b x) for each channel of a key in place of one number
for each head, and w = sigmoid(W_w x) for each channel of a value; the output gate has a bias. The
layer is that of flash-linear-attention (layers/gdn2.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.nn.linear import ColumnParallelLinear
from pretrain.nn.mixers.base import (
    MixerCard,
    accumulation_dtype,
    heads,
    register,
)
from pretrain.nn.mixers.conversion import QKVO, Conversion, slow_decay, value_sizes
from pretrain.nn.mixers.kimi_delta_attention import (
    KimiDeltaAttention,
    KimiDeltaAttentionConfig,
)
from pretrain.nn.mixers.mitigations import recur
from pretrain.nn.mixers.sizes import integral
from pretrain.ops import gdn2
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class GatedDeltaNet2Config(KimiDeltaAttentionConfig):
    """Settings of Gated DeltaNet-2."""

    expand_v: float = setting(1.0, above=0)
    """Width V of a value as a multiple of a key's."""
    gate_bias: bool = True
    """Whether the output gate has a bias."""
    allow_neg_eigval: bool = False
    """Whether the erase gate is in (0, 2) instead of (0, 1), which makes negative eigenvalues
    possible (arXiv 2411.12537)."""

    @property
    @override
    def value_dim(self) -> int:
        return integral(self.head_dim * self.expand_v, "head_dim * expand_v")


@register("gdn2")
class GatedDeltaNet2(KimiDeltaAttention):
    """Gated DeltaNet-2, as a mixer; its state is that of Kimi delta attention."""

    config_class = GatedDeltaNet2Config
    conversion = Conversion(value_sizes, QKVO, slow_decay)
    card = MixerCard(
        "Gated DeltaNet-2",
        "S_t = (I - k_t^T (b_t k_t)) Diag(a_t) S_{t-1} + k_t^T (w_t v_t);  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform, pairs by halving",
        "flash-linear-attention, layers/gdn2.py",
    )

    w_proj: ColumnParallelLinear

    @classmethod
    @override
    def gates(cls, config: GatedDeltaNet2Config) -> dict[str, int]:
        return {"b": config.head_dim, "w": config.value_dim}

    @override
    def recurrence(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        **options: Any,
    ) -> Tensor:
        erase = _gate(heads(self.b_proj(x), self.num_heads), 1 + self.config.allow_neg_eigval)
        write = _gate(heads(self.w_proj(x), self.num_heads), 1)
        self.note(erase=erase, write=write)
        return recur(self, gdn2, q, k, v, erase, write, log_decay=log_decay, **options)

    @classmethod
    @override
    def check(cls, config: GatedDeltaNet2Config, hidden_size: int) -> None:
        super().check(config, hidden_size)
        integral(config.head_dim * config.expand_v, "head_dim * expand_v")


@fused
def _gate(gate: Tensor, most: int) -> Tensor:
    """Return ``most * sigmoid(gate)`` in the gate's dtype, computed in float32 or wider."""
    return (most * gate.to(accumulation_dtype(gate.dtype)).sigmoid()).to(gate.dtype)
