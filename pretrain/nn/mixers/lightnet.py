"""LightNet (arXiv 2405.21022): every key channel is a softmax over the past.

    S_t = sum_{s<=t} e^{k_s} v_s / sum_{s<=t} e^{k_s} per key channel;  o_t = K^-1/2 SiLU(q_t) S_t

With z_t, the logarithm of the sum, that is ``S_t = Diag(e^{z_{t-1} - z_t}) S_{t-1} +
(e^{k_t - z_t})^T v_t``: linear attention with decays per key channel. RMSNorm over the full width,
times SiLU of a gate of low rank, through W_o. The paper's positions are for images; text has none
here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import ReplicatedLinear, column_input, column_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
)
from pretrain.nn.mixers.parts import linear_attention_flops, matrix_state, power_of_two
from pretrain.nn.mixers.sizes import integral, split_width
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, sharded_parameter
from pretrain.ops import linear_attention, log_sum_exp_gate
from pretrain.ops.elementwise.gating import silu_gate
from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class LightNetConfig(MixerConfig):
    """Settings of LightNet; values are ``hidden_size / num_heads`` wide."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: ``hidden_size / num_heads`` or, where that is null too, 128, a
    quarter of a smaller width, or what divides the width near that."""
    gate_rank: int = setting(128, minimum=1)
    """Channels between the two matrices of the output's gate."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 128)
        num_heads = num_heads or integral(hidden_size / head_dim, "hidden_size / head_dim")
        head_dim = head_dim or integral(hidden_size / num_heads, "hidden_size / num_heads")
        return replace(self, num_heads=num_heads, head_dim=head_dim)

    def shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Return (num_heads, key width, value width).

        Raises ValueError where heads do not divide the model's width.
        """
        value_dim = integral(hidden_size / self.num_heads, "hidden_size / num_heads")
        return self.num_heads, self.head_dim, value_dim


@register("lightnet")
class LightNet(Mixer):
    """LightNet, as a mixer.

    Its state is S ``[N, H, K, V]`` and z ``[N, H, K]``, both in float32.
    """

    config_class = LightNetConfig
    exact_states = ("log_sum",)
    card = MixerCard(
        "LightNet",
        "S_t = sum_s e^{k_s} v_s / sum_s e^{k_s} per key channel;  o_t = q_t S_t",
        "H K (V + 1)",
        "chunks, pairs by halving",
        "arXiv 2405.21022",
    )

    def __init__(self, config: LightNetConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        num_heads, self.key_dim, self.value_dim = config.shape(d)
        self.num_heads = parallel.local(num_heads, "num_heads")
        k_dim = num_heads * self.key_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, d, context.std)
        self.g_down = ReplicatedLinear(parallel, d, config.gate_rank, context.std)
        self.g_up = column_linear(
            parallel, config.gate_rank, d, context.std, role="input", precise=True
        )
        self.o_proj = row_linear(parallel, d, d, context.output_std)
        width = self.num_heads * self.value_dim
        self.norm = sharded_parameter(parallel, (width,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        q = recomputed(F.silu, self.q_proj(x))
        q, logits, v = (heads(t, self.num_heads) for t in (q, self.k_proj(x), self.v_proj(x)))
        weight, log_decay, log_sum = log_sum_exp_gate(
            logits,
            sequences=sequences,
            initial_state=None if state is None else state["log_sum"],
        )
        self.note(log_decay=log_decay, logits=logits)
        y, recurrent = linear_attention(
            q,
            weight,
            v,
            log_decay=log_decay,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
        )
        y = sharded_rms_norm(y.flatten(2), self.norm, self.config.norm_eps, self.parallel)
        y = silu_gate(y.transpose(0, 1), self.g_up(self.g_down(x)))
        return self.o_proj(y), {"recurrent": recurrent, "log_sum": log_sum}

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.key_dim)
        return {
            "recurrent": matrix_state(self.parallel, *shape, self.value_dim),
            "log_sum": matrix_state(self.parallel, *shape).fill_(-torch.inf),
        }

    @classmethod
    @override
    def check(cls, config: LightNetConfig, hidden_size: int) -> None:
        config.shape(hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def num_parameters(cls, config: LightNetConfig, hidden_size: int) -> int:
        return _matrices(config, hidden_size) + hidden_size

    @classmethod
    @override
    def flops_per_token(cls, config: LightNetConfig, hidden_size: int, seq_len: int) -> int:
        num_heads, key_dim, value_dim = config.shape(hidden_size)
        mixing = linear_attention_flops(key_dim, value_dim, config.chunk_size, per_channel=True)
        return 2 * _matrices(config, hidden_size) + num_heads * mixing

    @classmethod
    @override
    def state_bytes(cls, config: LightNetConfig, hidden_size: int, seq_len: int) -> int:
        num_heads, key_dim, value_dim = config.shape(hidden_size)
        return 4 * num_heads * key_dim * (value_dim + 1)


def _matrices(config: LightNetConfig, hidden_size: int) -> int:
    """Return the parameters of all matrices."""
    keys = config.num_heads * config.head_dim
    return 2 * hidden_size * (keys + hidden_size + config.gate_rank)
