"""RetNet's multi-scale retention (arXiv 2307.08621): a fixed decay per head, rotary positions.

Head h of H decays by 1 - 2^(-5-h). The output is RMSNorm(o) per head, times SiLU(W_g x), through
W_o.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor

from data_prep.config_files import setting
from pretrain.models.mixers.base import (
    Facts,
    LayerContext,
    Mixer,
    State,
    accumulation_dtype,
    heads,
    per_head,
    register,
    whole,
)
from pretrain.models.mixers.parts import linear_attention_flops, matrix_state
from pretrain.models.norm import rms_norm
from pretrain.ops import apply_rotary, linear_attention, rotary_embedding
from pretrain.ops.packing import token_positions
from pretrain.parallel.layers import (
    column_input,
    column_linear,
    constant,
    head_shared,
    replicated_parameter,
    row_linear,
)


@dataclass(frozen=True)
class RetNetConfig:
    """head_dim: width of a key, null = hidden_size / num_heads; a value is expand_v times as wide;
    rope_theta: null = no positions; chunk_size: tokens handled at once, which changes speed alone.
    """

    num_heads: int = setting(8, minimum=1)
    head_dim: int | None = setting(None, minimum=1)
    expand_v: float = setting(2.0, above=0)
    rope_theta: float | None = setting(10_000.0, above=0)
    norm_eps: float = setting(1e-5, above=0)
    chunk_size: int = setting(64, minimum=1)

    def dims(self, hidden_size: int) -> tuple[int, int]:
        """(key, value) width of a head."""
        key_dim = self.head_dim or per_head(hidden_size, self.num_heads)
        return key_dim, whole(key_dim * self.expand_v, "head_dim * expand_v")


@register("retnet")
class RetNet(Mixer):
    """State: S ``[N, H, K, V]`` in float32, and the number of tokens seen."""

    config_class = RetNetConfig
    facts = Facts(
        "RetNet", "S_t = a_h S_{t-1} + k_t^T v_t;  o_t = q_t S_t;  a_h = 1 - 2^(-5-h)",
        "H K V", "chunks", "arXiv 2307.08621",
    )  # fmt: skip

    def __init__(self, config: RetNetConfig, context: LayerContext):
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
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        self.norm = replicated_parameter(parallel, (self.value_dim,), constant(1.0))

    def _log_decay(self, x: Tensor) -> Tensor:
        first = parallel_state.get_tensor_model_parallel_rank() * self.num_heads
        logs = [math.log1p(-(2.0 ** -(5 + first + h))) for h in range(self.num_heads)]
        dtype = accumulation_dtype(x.dtype)
        return torch.tensor(logs, dtype=dtype, device=x.device)

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel)
        q, k, v, gate = (
            heads(getattr(self, f"{name}_proj")(x)[0], self.num_heads) for name in "qkvg"
        )
        batch_size, length = q.shape[:2]
        if cu_seqlens is None:
            places = torch.arange(length, device=x.device).expand(batch_size, length)
            lengths = torch.full((batch_size,), length, device=x.device)
        else:
            places, lengths = token_positions(cu_seqlens)[None], cu_seqlens.diff()
        if state is not None:
            seen = torch.repeat_interleave(state["seen"], lengths)
            places = places + seen.view(places.shape)
        if self.config.rope_theta is not None:
            cos, sin = rotary_embedding(places, self.key_dim, self.config.rope_theta)
            q, k = apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
        y, recurrent = linear_attention(
            q, k, v, log_decay=self._log_decay(x).expand(batch_size, length, -1),
            cu_seqlens=cu_seqlens, chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
        )  # fmt: skip
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps) * F.silu(gate)
        seen = lengths + (0 if state is None else state["seen"])
        return self.o_proj(y.flatten(2).transpose(0, 1))[0], {"recurrent": recurrent, "seen": seen}

    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.parallel.device)
        return {"recurrent": matrix_state(self.parallel, *shape), "seen": seen}

    @classmethod
    def check(cls, config: RetNetConfig, hidden_size: int) -> None:
        key_dim, _ = config.dims(hidden_size)
        if config.rope_theta is not None and key_dim % 2:
            raise ValueError(f"head_dim is {key_dim}, expected an even number for rotary positions")

    @classmethod
    def num_parameters(cls, config: RetNetConfig, hidden_size: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        return hidden_size * config.num_heads * (2 * key_dim + 3 * value_dim) + value_dim

    @classmethod
    def flops_per_token(cls, config: RetNetConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        mixing = linear_attention_flops(key_dim, value_dim, config.chunk_size)
        return config.num_heads * (2 * hidden_size * (2 * key_dim + 3 * value_dim) + mixing)

    @classmethod
    def state_bytes(cls, config: RetNetConfig, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.dims(hidden_size)
        return 4 * config.num_heads * key_dim * value_dim
