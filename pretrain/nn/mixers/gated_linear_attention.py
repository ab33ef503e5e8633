"""Gated linear attention (GLA, arXiv 2312.06635): a decay per key channel, made from the input.

log decay = logsigmoid(W2 W1 x + b) / 16 with W1 to 16 channels. No convolution, no positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from pretrain.common.config_loader import setting
from pretrain.nn.linear import ReplicatedLinear, column_linear, constant
from pretrain.nn.mixers.base import LayerContext, MixerCard, heads, register, whole
from pretrain.nn.mixers.linear_family import LinearFamilyConfig, LinearFamilyMixer
from pretrain.nn.mixers.parts import gate_parameter, power_of_two


@dataclass(frozen=True)
class GatedLinearAttentionConfig(LinearFamilyConfig):
    """As for ``linear_attn``, but head_dim: null = hidden_size / (2 num_heads); gate_rank: channels
    between the two matrices of the decay; gate_normalizer: what its logarithm is divided by;
    chunk_size: a power of two."""

    num_heads: int = setting(4, minimum=1)
    expand_v: float = setting(2.0, above=0)
    gate_rank: int = setting(16, minimum=1)
    gate_normalizer: float = setting(16.0, above=0)

    def dims(self, hidden_size: int) -> tuple[int, int]:
        """(key, value) width of a head."""
        key_dim = self.head_dim or whole(
            hidden_size / (2 * self.num_heads), "hidden_size / (2 num_heads)"
        )
        return key_dim, whole(key_dim * self.expand_v, "head_dim * expand_v")


@register("gla")
class GatedLinearAttention(LinearFamilyMixer):
    """Decays per key channel."""

    config_class = GatedLinearAttentionConfig
    per_channel = True
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
        self.a_up = column_linear(parallel, config.gate_rank, k_dim, context.std, grows=False)
        self.a_bias = gate_parameter(parallel, (self.num_heads * self.key_dim,), constant(0.0))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log-decays ``[B, T, H, K]``."""
        decay = self.a_up(self.a_down(x)[0])[0].to(self.a_bias.dtype) + self.a_bias
        return heads(F.logsigmoid(decay), self.num_heads) / self.config.gate_normalizer

    @classmethod
    def check(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> None:
        config.dims(hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    def extras(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> tuple[int, int]:
        """The decay's matrices and bias."""
        k_dim = config.num_heads * config.dims(hidden_size)[0]
        matrices = config.gate_rank * (hidden_size + k_dim)
        return matrices + k_dim, 2 * matrices
