"""RAT (arXiv 2507.04416): recurrence inside chunks, attention across them.

See :mod:`pretrain.ops.rat`. q and k come from few groups of heads, shared; v, the averaging gate g
= sigmoid(W_g x + b) and the output gate z = sigmoid(W_z x) are full width; y = W_o (z * o). A
group's heads are consecutive (the public code deals heads to groups in turn, which is the same up
to the order of weights).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences, select_packed
from pretrain.nn.linear import (
    column_input,
    column_linear,
    group_linear,
    row_linear,
)
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
)
from pretrain.nn.mixers.parts import gate_parameter, matrix_state, repeat_heads
from pretrain.nn.mixers.sizes import attention_heads
from pretrain.ops import RATState, rat
from pretrain.ops.elementwise.gating import biased_sigmoid, sigmoid_gate


@dataclass(frozen=True)
class RATConfig(MixerConfig):
    """Settings of RAT."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as for ``attn``."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a head; null: ``hidden_size / num_heads``."""
    num_qk_groups: Derived = setting(None, minimum=1)
    """Groups of heads that share queries and keys, a divisor of ``num_heads``; null: two, as
    published, or one for an odd number of heads."""
    chunk_size: int = setting(16, minimum=2)
    """Tokens averaged before attention sees them, which is part of the model."""
    rope_theta: float | None = setting(10_000.0, above=0)
    """Base of rotary positions; null: no positions."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = attention_heads(
            hidden_size, self.num_heads, self.head_dim, self.num_qk_groups
        )
        groups = self.num_qk_groups or (1 if num_heads % 2 else 2)
        return replace(self, num_heads=num_heads, head_dim=head_dim, num_qk_groups=groups)


@register("rat")
class RAT(Mixer):
    """RAT, as a mixer; its state is a :class:`pretrain.ops.RATState`."""

    config_class = RATConfig
    over_time = "ops"
    speed_settings = ()
    growing_states = ("keys", "values")
    card = MixerCard(
        "RAT",
        "v~_t = g_t v~_{t-1} + (1 - g_t) v_t in chunks of L, k~ likewise; "
        "o_t = softmax attention of q_t to the chunk ends and itself",
        "2 H D (T / L + 1)",
        "chunks side by side, attention across",
        "arXiv 2507.04416",
    )

    def __init__(self, config: RATConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.head_dim = config.head_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width = config.num_heads * self.head_dim
        self.z_proj = column_linear(parallel, d, width, context.std)
        self.v_proj = column_linear(parallel, d, width, context.std)
        self.g_proj = column_linear(parallel, d, width, context.std)
        for name in "qk":
            projection = group_linear(
                parallel, d, config.num_qk_groups, self.head_dim, context.std, "num_qk_groups"
            )
            setattr(self, f"{name}_proj", projection)
        self.groups = max(config.num_qk_groups // parallel.tensor_size, 1)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        self.g_bias = gate_parameter(parallel, (self.num_heads * self.head_dim,), self._bias_init)

    def _bias_init(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Draw log U(1, L - 1): averages over 2 to L tokens."""
        high = max(self.config.chunk_size - 1, 1)
        return (1 + torch.rand(shape, generator=generator) * (high - 1)).log()

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        v = heads(self.v_proj(x), self.num_heads)
        gate = biased_sigmoid(self.g_proj(x), self.g_bias)
        q, k = (
            repeat_heads(
                heads(getattr(self, f"{name}_proj")(x), self.groups), self.num_heads // self.groups
            )
            for name in "qk"
        )
        self.note(average=gate)
        y, new = rat(
            q,
            k,
            v,
            heads(gate, self.num_heads),
            chunk_size=self.config.chunk_size,
            rope_theta=self.config.rope_theta,
            sequences=sequences,
            initial_state=None if state is None else RATState(**state),
            watch=self.watch,
        )
        y = sigmoid_gate(y.flatten(2).transpose(0, 1), self.z_proj(x))
        return self.o_proj(y), dict(vars(new))

    @override
    def init_state(self, batch_size: int) -> State:
        zeros = matrix_state(self.parallel, batch_size, self.num_heads, self.head_dim)
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.parallel.device)
        return {"keys": zeros[:0], "values": zeros[:0], "key": zeros, "value": zeros, "seen": seen}

    @override
    def select_state(self, state: State, indices: Tensor) -> State:
        ends = state["seen"] // self.config.chunk_size
        packed = {name: select_packed(state[name], ends, indices) for name in ("keys", "values")}
        return {**packed, **{name: state[name][indices] for name in ("key", "value", "seen")}}

    @classmethod
    @override
    def check(cls, config: RATConfig, hidden_size: int) -> None:
        dim = config.head_dim
        if config.num_heads % config.num_qk_groups:
            raise ValueError(
                f"num_qk_groups is {config.num_qk_groups}, which does not divide num_heads "
                f"{config.num_heads}"
            )
        if config.rope_theta is not None and dim % 2:
            raise ValueError(f"head_dim is {dim}, expected an even number for rotary positions")

    @classmethod
    @override
    def sharded_counts(cls, config: RATConfig, hidden_size: int) -> dict[str, int]:
        return {"num_heads": config.num_heads, "num_qk_groups": config.num_qk_groups}

    @classmethod
    @override
    def num_parameters(cls, config: RATConfig, hidden_size: int) -> int:
        dim = config.head_dim
        width = config.num_heads * dim
        return hidden_size * (4 * width + 2 * config.num_qk_groups * dim) + width

    @classmethod
    @override
    def flops_per_token(cls, config: RATConfig, hidden_size: int, seq_len: int) -> int:
        dim = config.head_dim
        matrices = hidden_size * (4 * config.num_heads + 2 * config.num_qk_groups) * dim
        ends = -(-seq_len // config.chunk_size) - 1  # all are compared, later ones then hidden
        return 2 * matrices + 4 * config.num_heads * dim * ends

    @classmethod
    @override
    def state_bytes(cls, config: RATConfig, hidden_size: int, seq_len: int) -> int:
        width = config.num_heads * config.head_dim
        return 8 * width * (seq_len // config.chunk_size + 1)
