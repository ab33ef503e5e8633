"""Kimi delta attention (Kimi Linear, arXiv 2510.26692): the delta rule with decays per key channel.

log decay = -exp(A_log) softplus(W2 W1 x + dt_bias), A_log per head, dt_bias per key channel, W1 to
the width of one head; the output gate has the same two-matrix form and a sigmoid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import (
    ColumnParallelLinear,
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
from pretrain.nn.mixers.conversion import QKVO, Conversion, head_sizes, slow_decay
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
from pretrain.nn.parameters import constant, replicated_parameter, sharded_parameter
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
    gate_bias: bool = False
    """Whether the output gate has a bias."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @property
    def value_dim(self) -> int:
        """Return the width V of a value."""
        return self.head_dim

    @override
    def resolve(self, hidden_size: int) -> Self:
        sizes = delta_rule_sizes(hidden_size, self.num_heads, self.head_dim, 1.0, 128)
        return replace(self, num_heads=sizes[0], head_dim=sizes[1])


@register("kda")
class KimiDeltaAttention(Mixer):
    """Kimi delta attention, as a mixer.

    Its state is the convolutions' last inputs, and S ``[N, H, K, V]`` in float32. A subclass says
    by :meth:`gates` and :meth:`recurrence` what erases and what writes.
    """

    config_class: ClassVar[type[MixerConfig]] = KimiDeltaAttentionConfig
    over_time = "ops"
    mitigable: tuple[str, ...] = DELTA_RULE
    conversion = Conversion(head_sizes, QKVO, slow_decay)
    card = MixerCard(
        "Kimi delta attention",
        "S_t = (I - b_t k_t^T k_t) Diag(a_t) S_{t-1} + b_t k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform, pairs by halving",
        "arXiv 2510.26692",
    )

    b_proj: ColumnParallelLinear

    def __init__(self, config: Any, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, rank = context.hidden_size, context.parallel, config.value_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        per_head = {"q": config.head_dim, "k": config.head_dim, "v": config.value_dim}
        widths = {name: config.num_heads * dim for name, dim in per_head.items()}
        for name, width in widths.items():
            setattr(self, f"{name}_proj", column_linear(parallel, d, width, context.std))
        for name, width in (("a", widths["k"]), ("g", widths["v"])):
            setattr(self, f"{name}_down", ReplicatedLinear(parallel, d, rank, context.std))
            setattr(
                self,
                f"{name}_up",
                column_linear(parallel, rank, width, context.std, role="input", precise=True),
            )
        for name, dim in self.gates(config).items():
            gate = column_linear(parallel, d, config.num_heads * dim, context.std, precise=dim == 1)
            setattr(self, f"{name}_proj", gate)
        self.o_proj = row_linear(parallel, widths["v"], d, context.output_std)
        local = {name: self.num_heads * dim for name, dim in per_head.items()}
        add_short_convolutions(self, parallel, local, config.conv_size)
        self.A_log = gate_parameter(parallel, (self.num_heads,), decay_rate_init(1))
        self.dt_bias = gate_parameter(parallel, (local["k"],), time_step_init)
        self.norm = replicated_parameter(parallel, (config.value_dim,), constant(1.0))
        if config.gate_bias:
            self.g_bias = sharded_parameter(parallel, (local["v"],), constant(0.0))

    @classmethod
    def gates(cls, config: Any) -> dict[str, int]:
        """Return the widths per head of what gates erasing and writing, by names of one letter."""
        return {"b": 1}

    def recurrence(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor,
        **options: Any,
    ) -> Tensor:
        """Return the recurrence's output ``[B, T, H, V]``; its final state goes into new_state."""
        beta = self.b_proj(x).to(accumulation_dtype(x.dtype)).sigmoid().transpose(0, 1)
        beta = beta * (1 + self.config.allow_neg_eigval)
        self.note(beta=beta)
        return recur(
            self,
            delta_rule,
            q,
            k,
            v,
            beta,
            log_decay=log_decay,
            **options,
        )

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
        y = self.recurrence(
            x,
            l2_norm(q),
            l2_norm(k),
            v,
            log_decay,
            state=state,
            new_state=new_state,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        norm = head_shared(self.norm, self.parallel)
        y = rms_norm_sigmoid_gate(y, norm, self.output_gate(gate), self.config.norm_eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    def output_gate(self, gate: Tensor) -> Tensor:
        """Return the output gate ``[B, T, H, V]`` before its sigmoid."""
        if not self.config.gate_bias:
            return gate
        return gate + self.g_bias.unflatten(0, (self.num_heads, -1))

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (self.num_heads, self.config.head_dim, self.config.value_dim)
        return {
            **convolution_states(self, self.parallel, batch_size, "qkv"),
            "recurrent": matrix_state(self.parallel, batch_size, *shape),
        }

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        power_of_two(config.chunk_size)

    @classmethod
    def matrices(cls, config: Any, hidden_size: int) -> int:
        """Return the parameters of all projections."""
        h, k, v = config.num_heads, config.head_dim, config.value_dim
        widths = 2 * k + 2 * v + sum(cls.gates(config).values())
        return int(hidden_size * (h * widths + 2 * v) + v * h * (k + v))

    @classmethod
    @override
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        h, k, v = config.num_heads, config.head_dim, config.value_dim
        vectors = config.conv_size * h * (2 * k + v) + h + h * k + v + config.gate_bias * h * v
        return cls.matrices(config, hidden_size) + vectors

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        mixing = delta_rule_flops(
            config.head_dim, config.value_dim, config.chunk_size, per_channel=True
        )
        return 2 * cls.matrices(config, hidden_size) + config.num_heads * mixing

    @classmethod
    @override
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        h, k, v = config.num_heads, config.head_dim, config.value_dim
        return 4 * h * k * v + 2 * max(config.conv_size - 1, 0) * h * (2 * k + v)
