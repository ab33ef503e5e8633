"""Linear attention (arXiv 2006.16236): no decay, a feature map on queries and keys.

``product`` is the learned map (W_a x + b_a) * (W_b x + b_b) within a head, its weights shared by
the heads, with maps of their own for q and k. The output is RMSNorm(o) per head, through W_o.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.config_files import setting
from pretrain.models.mixers.base import (
    Facts,
    LayerContext,
    Mixer,
    State,
    heads,
    per_head,
    register,
    whole,
)
from pretrain.models.mixers.parts import linear_attention_flops, matrix_state
from pretrain.models.norm import rms_norm
from pretrain.ops import linear_attention
from pretrain.parallel.layers import (
    column_input,
    column_linear,
    constant,
    head_shared,
    normal,
    replicated_parameter,
    row_linear,
)

FEATURE_MAPS = ("product", "elu", "relu", "identity")


@dataclass(frozen=True)
class LinearAttentionConfig:
    """head_dim: width of a key, null = hidden_size / num_heads; a value is expand_v times as wide;
    feature_map: ``product`` (learned), ``elu`` (elu + 1), ``relu`` or ``identity``; normalize:
    divide by q_t times the sum of keys so far; chunk_size: tokens handled at once, which changes
    speed alone."""

    num_heads: int = setting(8, minimum=1)
    head_dim: int | None = setting(None, minimum=1)
    expand_v: float = setting(1.0, above=0)
    feature_map: str = setting("product", choices=FEATURE_MAPS)
    normalize: bool = False
    norm_eps: float = setting(1e-5, above=0)
    chunk_size: int = setting(64, minimum=1)

    def dims(self, hidden_size: int) -> tuple[int, int]:
        """(key, value) width of a head."""
        key_dim = self.head_dim or per_head(hidden_size, self.num_heads)
        return key_dim, whole(key_dim * self.expand_v, "head_dim * expand_v")


@register("linear_attn")
class LinearAttention(Mixer):
    """State: S ``[N, H, K, V]`` in float32; with ``normalize`` one more column, the sum of keys."""

    config_class = LinearAttentionConfig
    facts = Facts(
        "linear attention", "S_t = S_{t-1} + f(k_t)^T v_t;  o_t = f(q_t) S_t",
        "H K V", "chunks", "arXiv 2006.16236",
    )  # fmt: skip

    def __init__(self, config: LinearAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.key_dim, self.value_dim = config.dims(d)
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        k_dim, v_dim = config.num_heads * self.key_dim, config.num_heads * self.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        self.norm = replicated_parameter(parallel, (self.value_dim,), constant(1.0))
        if config.feature_map == "product":
            dim = self.key_dim
            for name in "qk":
                self.register_parameter(
                    f"{name}_map", replicated_parameter(parallel, (2, dim, dim), normal(dim**-0.5))
                )
                bias = replicated_parameter(parallel, (2, 1, dim), constant(0.0), decay=False)
                self.register_parameter(f"{name}_map_bias", bias)

    def _features(self, name: str, x: Tensor) -> Tensor:
        kind = self.config.feature_map
        if kind == "elu":
            return F.elu(x) + 1
        if kind == "relu":
            return F.relu(x)
        if kind == "identity":
            return x
        weight, bias = (
            head_shared(getattr(self, name), self.parallel)
            for name in (f"{name}_map", f"{name}_map_bias")
        )
        first, second = torch.baddbmm(
            bias, x.reshape(1, -1, self.key_dim).expand(2, -1, -1), weight
        )
        return (first * second).view(x.shape)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel)
        q, k, v = (heads(getattr(self, f"{name}_proj")(x)[0], self.num_heads) for name in "qkv")
        if self.config.normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
        y, recurrent = linear_attention(
            self._features("q", q), self._features("k", k), v,
            cu_seqlens=cu_seqlens, chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
        )  # fmt: skip
        if self.config.normalize:
            y = y[..., :-1] / (y[..., -1:] + 1e-10)
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps)
        return self.o_proj(y.flatten(2).transpose(0, 1))[0], {"recurrent": recurrent}

    def init_state(self, batch_size: int) -> State:
        width = self.value_dim + self.config.normalize
        shape = (batch_size, self.num_heads, self.key_dim, width)
        return {"recurrent": matrix_state(self.parallel, *shape)}

    @classmethod
    def check(cls, config: LinearAttentionConfig, hidden_size: int) -> None:
        config.dims(hidden_size)
        if config.normalize and config.feature_map not in ("elu", "relu"):
            raise ValueError(
                f"normalize needs a feature_map that is never negative (elu, relu), found "
                f"{config.feature_map}"
            )

    @classmethod
    def num_parameters(cls, config: LinearAttentionConfig, hidden_size: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        maps = 4 * key_dim * (key_dim + 1) if config.feature_map == "product" else 0
        return 2 * hidden_size * config.num_heads * (key_dim + value_dim) + value_dim + maps

    @classmethod
    def flops_per_token(cls, config: LinearAttentionConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        maps = 8 * key_dim**2 if config.feature_map == "product" else 0
        mixing = linear_attention_flops(key_dim, value_dim + config.normalize, config.chunk_size)
        return config.num_heads * (4 * hidden_size * (key_dim + value_dim) + maps + mixing)

    @classmethod
    def state_bytes(cls, config: LinearAttentionConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        return 4 * config.num_heads * key_dim * (value_dim + config.normalize)
