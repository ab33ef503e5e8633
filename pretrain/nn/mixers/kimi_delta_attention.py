"""Kimi delta attention (Kimi Linear, arXiv 2510.26692): the delta rule with decays per key channel.

log decay = -exp(A_log) softplus(W2 W1 x + dt_bias), A_log per head, dt_bias per key channel, W1 to
the width of one head; the output gate has the same two-matrix form and a sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import (
    ReplicatedLinear,
    column_input,
    column_linear,
    head_shared,
    row_linear,
)
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
from pretrain.nn.mixers.mitigations import DELTA_RULE, recur
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    decay_rate_init,
    delta_rule_flops,
    gate_parameter,
    l2_norm,
    matrix_state,
    power_of_two,
    softplus_decay,
    time_step_init,
)
from pretrain.nn.mixers.sizes import delta_rule_sizes
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import delta_rule
from pretrain.ops.elementwise.rms_norm import rms_norm_sigmoid_gate


@dataclass(frozen=True)
class KimiDeltaAttentionConfig(MixerConfig):
    """Settings of Kimi delta attention."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as many as make the keys of all heads together as wide as the model."""
    head_dim: Derived = setting(None, minimum=1)
    """Width of a key and of a value; null: the largest power of two that is at most 128 and a
    quarter of the model's width, or with ``num_heads`` given the head's share of the keys."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries, keys and values; 0: there is none."""
    allow_neg_eigval: bool = False
    """Whether beta is in (0, 2) instead of (0, 1), which makes negative eigenvalues possible."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        sizes = delta_rule_sizes(hidden_size, self.num_heads, self.head_dim, 1.0, 128)
        return replace(self, num_heads=sizes[0], head_dim=sizes[1])


@register("kda")
class KimiDeltaAttention(Mixer):
    """Kimi delta attention, as a mixer.

    Its state is the convolutions' last inputs, and S ``[N, H, K, V]`` in float32.
    """

    config_class = KimiDeltaAttentionConfig
    over_time = "ops"
    mitigable = DELTA_RULE
    card = MixerCard(
        "Kimi delta attention",
        "S_t = (I - b_t k_t^T k_t) Diag(a_t) S_{t-1} + b_t k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform, pairs by halving",
        "arXiv 2510.26692",
    )

    def __init__(self, config: KimiDeltaAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, dim = context.hidden_size, context.parallel, config.head_dim
        self.num_heads, width = (
            parallel.local(config.num_heads, "num_heads"),
            config.num_heads * dim,
        )
        for name in "qkv":
            setattr(self, f"{name}_proj", column_linear(parallel, d, width, context.std))
        for name in "ag":
            setattr(self, f"{name}_down", ReplicatedLinear(parallel, d, dim, context.std))
            setattr(
                self,
                f"{name}_up",
                column_linear(parallel, dim, width, context.std, role="input", precise=True),
            )
        self.b_proj = column_linear(parallel, d, config.num_heads, context.std, precise=True)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        local = self.num_heads * dim
        add_short_convolutions(self, parallel, dict.fromkeys("qkv", local), config.conv_size)
        self.A_log = gate_parameter(parallel, (self.num_heads,), decay_rate_init(1))
        self.dt_bias = gate_parameter(parallel, (local,), time_step_init)
        self.norm = replicated_parameter(parallel, (dim,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k, v = (
            convolve(
                self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state
            ).unflatten(-1, (self.num_heads, -1))
            for name in "qkv"
        )
        decay, gate = (
            heads(getattr(self, f"{name}_up")(getattr(self, f"{name}_down")(x)), self.num_heads)
            for name in "ag"
        )
        log_decay = softplus_decay(
            decay, self.A_log[:, None], self.dt_bias.unflatten(0, (self.num_heads, -1))
        )
        beta = self.b_proj(x).to(accumulation_dtype(x.dtype)).sigmoid().transpose(0, 1)
        y = recur(
            self,
            delta_rule,
            l2_norm(q),
            l2_norm(k),
            v,
            beta * (1 + self.config.allow_neg_eigval),
            state=state,
            new_state=new_state,
            log_decay=log_decay,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        norm = head_shared(self.norm, self.parallel)
        y = rms_norm_sigmoid_gate(y, norm, gate, self.config.norm_eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        dim = self.config.head_dim
        return {
            **convolution_states(self, self.parallel, batch_size, "qkv"),
            "recurrent": matrix_state(self.parallel, batch_size, self.num_heads, dim, dim),
        }

    @classmethod
    @override
    def check(cls, config: KimiDeltaAttentionConfig, hidden_size: int) -> None:
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def num_parameters(cls, config: KimiDeltaAttentionConfig, hidden_size: int) -> int:
        h, dim = config.num_heads, config.head_dim
        matrices = hidden_size * (4 * h * dim + h + 2 * dim) + 2 * dim * h * dim
        return matrices + 3 * config.conv_size * h * dim + h + h * dim + dim

    @classmethod
    @override
    def flops_per_token(
        cls, config: KimiDeltaAttentionConfig, hidden_size: int, seq_len: int
    ) -> int:
        h, dim = config.num_heads, config.head_dim
        matrices = hidden_size * (4 * h * dim + h + 2 * dim) + 2 * dim * h * dim
        return 2 * matrices + h * delta_rule_flops(dim, dim, config.chunk_size, per_channel=True)

    @classmethod
    @override
    def state_bytes(cls, config: KimiDeltaAttentionConfig, hidden_size: int, seq_len: int) -> int:
        h, dim = config.num_heads, config.head_dim
        return 4 * h * dim * dim + 2 * max(config.conv_size - 1, 0) * 3 * h * dim
