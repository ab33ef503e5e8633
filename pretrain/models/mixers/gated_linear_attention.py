"""Gated linear attention (GLA, arXiv 2312.06635): a decay per key channel, made from the input.

log decay = logsigmoid(W2 W1 x + b) / 16 with W1 to 16 channels; the output is RMSNorm(o) per head
times SiLU(W_g x), through W_o. No convolution, no positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from data_prep.config_files import setting
from pretrain.models.mixers.base import Facts, LayerContext, Mixer, State, heads, register, whole
from pretrain.models.mixers.parts import (
    gate_parameter,
    linear_attention_flops,
    matrix_state,
    power_of_two,
)
from pretrain.models.norm import rms_norm
from pretrain.ops import linear_attention
from pretrain.parallel.layers import (
    SharedLinear,
    column_input,
    column_linear,
    constant,
    head_shared,
    replicated_parameter,
    row_linear,
)


@dataclass(frozen=True)
class GatedLinearAttentionConfig:
    """head_dim: width of a key, null = hidden_size / (2 num_heads); a value is expand_v times as
    wide; gate_rank: channels between the two matrices of the decay; gate_normalizer: what its
    logarithm is divided by; chunk_size: tokens handled at once, a power of two."""

    num_heads: int = setting(4, minimum=1)
    head_dim: int | None = setting(None, minimum=1)
    expand_v: float = setting(2.0, above=0)
    gate_rank: int = setting(16, minimum=1)
    gate_normalizer: float = setting(16.0, above=0)
    norm_eps: float = setting(1e-5, above=0)
    chunk_size: int = setting(64, minimum=1)

    def dims(self, hidden_size: int) -> tuple[int, int]:
        """(key, value) width of a head."""
        key_dim = self.head_dim or whole(
            hidden_size / (2 * self.num_heads), "hidden_size / (2 num_heads)"
        )
        return key_dim, whole(key_dim * self.expand_v, "head_dim * expand_v")


@register("gla")
class GatedLinearAttention(Mixer):
    """State: S ``[N, H, K, V]`` in float32."""

    config_class = GatedLinearAttentionConfig
    facts = Facts(
        "Gated linear attention", "S_t = Diag(a_t) S_{t-1} + k_t^T v_t;  o_t = q_t S_t",
        "H K V", "chunks, pairs by halving", "arXiv 2312.06635",
    )  # fmt: skip

    def __init__(self, config: GatedLinearAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.key_dim, self.value_dim = config.dims(d)
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        k_dim, v_dim = config.num_heads * self.key_dim, config.num_heads * self.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        self.g_proj = column_linear(parallel, d, v_dim, context.std)
        self.a_down = SharedLinear(parallel, d, config.gate_rank, context.std)
        self.a_up = column_linear(parallel, config.gate_rank, k_dim, context.std)
        self.a_bias = gate_parameter(parallel, (self.num_heads * self.key_dim,), constant(0.0))
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        self.norm = replicated_parameter(parallel, (self.value_dim,), constant(1.0))

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel)
        q, k, v, gate = (
            heads(getattr(self, f"{name}_proj")(x)[0], self.num_heads) for name in "qkvg"
        )
        decay = self.a_up(self.a_down(x)[0])[0].to(self.a_bias.dtype) + self.a_bias
        log_decay = heads(F.logsigmoid(decay), self.num_heads) / self.config.gate_normalizer
        y, recurrent = linear_attention(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
        )  # fmt: skip
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps) * F.silu(gate)
        return self.o_proj(y.flatten(2).transpose(0, 1))[0], {"recurrent": recurrent}

    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return {"recurrent": matrix_state(self.parallel, *shape)}

    @classmethod
    def check(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> None:
        config.dims(hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    def _matrices(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        k_dim, v_dim = config.num_heads * key_dim, config.num_heads * value_dim
        return hidden_size * (2 * k_dim + 3 * v_dim + config.gate_rank) + config.gate_rank * k_dim

    @classmethod
    def num_parameters(cls, config: GatedLinearAttentionConfig, hidden_size: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        return cls._matrices(config, hidden_size) + config.num_heads * key_dim + value_dim

    @classmethod
    def flops_per_token(
        cls, config: GatedLinearAttentionConfig, hidden_size: int, seq_len: int
    ) -> int:
        mixing = linear_attention_flops(
            *config.dims(hidden_size), config.chunk_size, per_channel=True
        )
        return 2 * cls._matrices(config, hidden_size) + config.num_heads * mixing

    @classmethod
    def state_bytes(cls, config: GatedLinearAttentionConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        return 4 * config.num_heads * key_dim * value_dim
