"""Gated linear attention (GLA, arXiv 2312.06635): a decay per key channel, made from the input.

log decay = logsigmoid(W2 W1 x + b) / 16 with W1 to 16 channels. No convolution, no positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.nn.linear import ReplicatedLinear, column_linear
from pretrain.nn.mixers.base import LayerContext, MixerCard, heads, register
from pretrain.nn.mixers.conversion import QKVO, Conversion, value_sizes
from pretrain.nn.mixers.linear_family import LinearFamilyConfig, LinearFamilyMixer
from pretrain.nn.mixers.parts import gate_parameter, power_of_two
from pretrain.nn.mixers.sizes import heads_for, integral, split_width
from pretrain.nn.parameters import constant
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class GatedLinearAttentionConfig(LinearFamilyConfig):
    """Settings of gated linear attention, whose keys are half as wide as the model."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / (2 head_dim)``, where a key has 256 channels, an eighth of a
    smaller width, or what divides half the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: ``hidden_size / (2 num_heads)``."""
    expand_v: float = setting(2.0, above=0)
    """Width V of a value as a multiple of a key's."""
    gate_rank: int = setting(16, minimum=1)
    """Channels between the two matrices of the decay."""
    gate_normalizer: float = setting(16.0, above=0)
    """Divisor of the decay's logarithm."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(max(hidden_size // 2, 1), 256, even=True)
        num_heads = num_heads or heads_for(hidden_size / 2, head_dim)
        head_dim = head_dim or integral(
            hidden_size / (2 * num_heads), "hidden_size / (2 num_heads)"
        )
        return replace(self, num_heads=num_heads, head_dim=head_dim)


@register("gla")
class GatedLinearAttention(LinearFamilyMixer):
    """Gated linear attention, as a mixer: decays per key channel."""

    config_class = GatedLinearAttentionConfig
    per_channel = True
    conversion = Conversion(
        value_sizes,
        QKVO,
        # sigmoid(a_bias) ** (1 / gate_normalizer) = exp(-0.01), nearly 0.99
        lambda config: {"a_bias": -math.log(math.expm1(0.01 * config.gate_normalizer))},
    )
    card = MixerCard(
        "Gated linear attention",
        "S_t = Diag(a_t) S_{t-1} + k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, pairs by halving",
        "arXiv 2312.06635",
    )

    def __init__(self, config: GatedLinearAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        d, parallel, k_dim = context.hidden_size, self.parallel, config.num_heads * self.key_dim
        self.a_down = ReplicatedLinear(parallel, d, config.gate_rank, context.std)
        self.a_up = column_linear(
            parallel, config.gate_rank, k_dim, context.std, role="input", precise=True
        )
        self.a_bias = gate_parameter(parallel, (self.num_heads * self.key_dim,), constant(0.0))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log-decays ``[B, T, H, K]``."""
        decay = _log_decay(self.a_up(self.a_down(x)), self.a_bias, self.config.gate_normalizer)
        return heads(decay, self.num_heads)

    @classmethod
    @override
    def check(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> None:
        super().check(config, hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    def extras(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> tuple[int, int]:
        """Return the parameters and FLOPs per token of the decay's matrices and bias."""
        k_dim = config.num_heads * config.head_dim
        matrices = config.gate_rank * (hidden_size + k_dim)
        return matrices + k_dim, 2 * matrices


@fused
def _log_decay(x: Tensor, bias: Tensor, normalizer: float) -> Tensor:
    return F.logsigmoid(x.to(bias.dtype) + bias) / normalizer
