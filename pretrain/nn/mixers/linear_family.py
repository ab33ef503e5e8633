"""The base of linear attention, RetNet and GLA; see :mod:`pretrain.ops.linear_attention`.

q, k, v = W x; what a subclass makes of them; the recurrence; RMSNorm(o) per head, times SiLU(W_g x)
where there is a gate, through W_o.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, head_shared, row_linear
from pretrain.nn.mixers.base import LayerContext, Mixer, MixerConfig, State, heads
from pretrain.nn.mixers.conversion import QKVO, Conversion, value_sizes
from pretrain.nn.mixers.mitigations import ALL, recur
from pretrain.nn.mixers.parts import linear_attention_flops, matrix_state
from pretrain.nn.mixers.sizes import heads_for, integral, per_head, split_width
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import linear_attention
from pretrain.ops.elementwise.rms_norm import rms_norm, rms_norm_silu_gate


@dataclass(frozen=True)
class LinearFamilyConfig(MixerConfig):
    """Settings that linear attention, RetNet and gated linear attention share."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a key has 256 channels, a quarter of a smaller
    width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: ``hidden_size / num_heads``."""
    expand_v: float = setting(1.0, above=0)
    """Width V of a value as a multiple of a key's."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @property
    def value_dim(self) -> int:
        """Return the width V of a value."""
        return integral(self.head_dim * self.expand_v, "head_dim * expand_v")

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 256, even=True)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        head_dim = head_dim or per_head(hidden_size, num_heads)
        return replace(self, num_heads=num_heads, head_dim=head_dim)


class LinearFamilyMixer(Mixer):
    """Linear attention with or without decay, as a mixer.

    Its state is S ``[N, H, K, V]`` in float32.
    """

    over_time = "ops"
    mitigable: tuple[str, ...] = ALL
    conversion = Conversion(value_sizes, QKVO)

    output_gate: ClassVar[bool] = True
    per_channel: ClassVar[bool] = False  # whether there is a decay for each key channel

    def __init__(self, config: Any, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.key_dim, self.value_dim = config.head_dim, config.value_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        k_dim, v_dim = config.num_heads * self.key_dim, config.num_heads * self.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        if self.output_gate:
            self.g_proj = column_linear(parallel, d, v_dim, context.std)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        self.norm = replicated_parameter(parallel, (self.value_dim,), constant(1.0))

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Compute log-decays ``[B, T, H]`` or ``[B, T, H, K]``."""
        return None

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences | None,
        state: State | None,
        new_state: State,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the recurrence is given of q, k and v ``[B, T, H, dim]``."""
        return q, k, v

    def finish(self, y: Tensor) -> Tensor:
        """Return what is normalised of the recurrence's output."""
        return y

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k, v = (heads(getattr(self, f"{name}_proj")(x), self.num_heads) for name in "qkv")
        q, k, v = self.prepare(q, k, v, sequences, state, new_state)
        y = recur(
            self,
            linear_attention,
            q,
            k,
            v,
            state=state,
            new_state=new_state,
            log_decay=self.log_decay(x),
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        y = self.finish(y)
        norm, eps = head_shared(self.norm, self.parallel), self.config.norm_eps
        if self.output_gate:
            y = rms_norm_silu_gate(y, norm, heads(self.g_proj(x), self.num_heads), eps)
        else:
            y = rms_norm(y, norm, eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (self.num_heads, self.key_dim, self.state_width(self.config, self.value_dim))
        return {"recurrent": matrix_state(self.parallel, batch_size, *shape)}

    @classmethod
    def state_width(cls, config: Any, value_dim: int) -> int:
        """Return the columns of the state."""
        return value_dim

    @classmethod
    def extras(cls, config: Any, hidden_size: int) -> tuple[int, int]:
        """Return (parameters, FLOPs per token) besides projections, norm and recurrence."""
        return 0, 0

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        integral(config.head_dim * config.expand_v, "head_dim * expand_v")

    @classmethod
    @override
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        key_dim, value_dim = config.head_dim, config.value_dim
        widths = config.num_heads * (2 * key_dim + (2 + cls.output_gate) * value_dim)
        return hidden_size * widths + value_dim + cls.extras(config, hidden_size)[0]

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.head_dim, config.value_dim
        widths = config.num_heads * (2 * key_dim + (2 + cls.output_gate) * value_dim)
        mixing = linear_attention_flops(
            key_dim,
            cls.state_width(config, value_dim),
            config.chunk_size,
            per_channel=cls.per_channel,
        )
        return (
            2 * hidden_size * widths
            + config.num_heads * mixing
            + cls.extras(config, hidden_size)[1]
        )

    @classmethod
    @override
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        key_dim, value_dim = config.head_dim, config.value_dim
        return 4 * config.num_heads * key_dim * cls.state_width(config, value_dim)
