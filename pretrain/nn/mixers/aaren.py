"""Aaren (arXiv 2405.13956): softmax attention as a recurrence, by a query that is learned.

    o_t = sum_{j<=t} softmax_j(q k_j / sqrt D) v_j, with one vector q for each head

As q is no function of x, the softmax over t tokens is the one over t - 1 tokens decayed, plus v_t:
a state of two numbers and a mean for each head. What a token reads does not depend on the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    accumulation_dtype,
    heads,
    register,
)
from pretrain.nn.mixers.parts import linear_attention_flops, matrix_state
from pretrain.nn.mixers.sizes import attention_heads
from pretrain.nn.parameters import normal, sharded_parameter
from pretrain.ops import linear_attention, log_sum_exp_gate
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class AarenConfig(MixerConfig):
    """Settings of Aaren."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a head has 64 channels, 128 from a width of
    2048, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width D of a key and of a value; null: ``hidden_size / num_heads``."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        sizes = attention_heads(hidden_size, self.num_heads, self.head_dim, None)
        return replace(self, num_heads=sizes[0], head_dim=sizes[1])


@register("aaren")
class Aaren(Mixer):
    """Aaren, as a mixer.

    Its state is the mean ``[N, H, 1, D]``, and ``[N, H, 1]`` the logarithm of the sum of its
    weights, both in float32.
    """

    config_class = AarenConfig
    exact_states = ("log_sum",)
    card = MixerCard(
        "Aaren",
        "o_t = sum_{j<=t} softmax_j(q k_j / sqrt D) v_j, q learned",
        "H (D + 1)",
        "chunks",
        "arXiv 2405.13956",
    )

    def __init__(self, config: AarenConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, width = (
            context.hidden_size,
            context.parallel,
            config.num_heads * config.head_dim,
        )
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        self.k_proj = column_linear(parallel, d, width, context.std)
        self.v_proj = column_linear(parallel, d, width, context.std)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        shape = (self.num_heads, config.head_dim)
        self.query = sharded_parameter(parallel, shape, normal(1.0), decay=False)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        k, v = (heads(projection(x), self.num_heads) for projection in (self.k_proj, self.v_proj))
        scores = _scores(k, self.query)
        weight, log_decay, log_sum = log_sum_exp_gate(
            scores,
            sequences=sequences,
            initial_state=None if state is None else state["log_sum"],
        )
        weight = weight.to(v.dtype)
        self.note(log_decay=log_decay, logits=scores)
        y, mean = linear_attention(
            torch.ones_like(weight),
            weight,
            v,
            log_decay=log_decay[..., 0],
            scale=1.0,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["mean"],
        )
        return self.o_proj(y.flatten(2).transpose(0, 1)), {"mean": mean, "log_sum": log_sum}

    @override
    def memory(self, state: State) -> Tensor | None:
        return state.get("mean")

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, 1)
        return {
            "mean": matrix_state(self.parallel, *shape, self.config.head_dim),
            "log_sum": matrix_state(self.parallel, *shape).fill_(-torch.inf),
        }

    @classmethod
    @override
    def num_parameters(cls, config: AarenConfig, hidden_size: int) -> int:
        return config.num_heads * config.head_dim * (3 * hidden_size + 1)

    @classmethod
    @override
    def flops_per_token(cls, config: AarenConfig, hidden_size: int, seq_len: int) -> int:
        mixing = linear_attention_flops(1, config.head_dim, config.chunk_size)
        return config.num_heads * (6 * hidden_size * config.head_dim + mixing)

    @classmethod
    @override
    def state_bytes(cls, config: AarenConfig, hidden_size: int, seq_len: int) -> int:
        return 4 * config.num_heads * (config.head_dim + 1)


@fused
def _scores(k: Tensor, query: Tensor) -> Tensor:
    """Return ``q k_j / sqrt D`` ``[B, T, H, 1]``, in float32 or wider."""
    dtype = accumulation_dtype(k.dtype)
    product = k.to(dtype) * (query.to(dtype) * k.shape[-1] ** -0.5)
    return product.sum(-1, keepdim=True)
