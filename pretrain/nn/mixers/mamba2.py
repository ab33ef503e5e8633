"""Mamba-2 (arXiv 2405.21060): a state-space model as linear attention with one decay per head.

    D_t = softplus(W_dt x + dt_bias);   S_t = exp(-exp(A_log) D_t) S_{t-1} + B_t^T (D_t x_t)
    y_t = C_t S_t + D x_t;              out = W_o RMSNorm(y * SiLU(z))

x, B, C pass a convolution with bias and SiLU; heads share B and C in consecutive groups; the norm
acts on each group's width. Models of it alone usually have no MLP (``mlp: {kind: none}``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, group_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
)
from pretrain.nn.mixers.conversion import Conversion
from pretrain.nn.mixers.mitigations import ALL, recur
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    decay_rate_init,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
    repeat_heads,
    time_step_init,
)
from pretrain.nn.mixers.sizes import integral, power_of_two_width, split_width
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, sharded_parameter
from pretrain.ops import linear_attention
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import skip_silu_gate
from pretrain.ops.elementwise.rms_norm import normalised


@dataclass(frozen=True)
class Mamba2Config(MixerConfig):
    """Settings of Mamba-2, which has ``hidden_size * expand / head_dim`` heads."""

    head_sizes: ClassVar[tuple[str, ...]] = ("head_dim", "state_size")
    head_counts: ClassVar[tuple[str, ...]] = ()

    expand: float = setting(2.0, above=0)
    """Inner width as a multiple of the model's."""
    head_dim: Derived = setting(None, minimum=1)
    """Width P of a head of x; null: 64, a quarter of a smaller inner width, or what divides the
    inner width near that."""
    state_size: Derived = setting(None, minimum=1)
    """Width N of B and C; null: the largest power of two that is at most 128 and a quarter of the
    model's width."""
    num_groups: int = setting(1, minimum=1)
    """Groups of heads that share B and C, a divisor of the number of heads."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over x, B and C; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        inner = integral(hidden_size * self.expand, "hidden_size * expand")
        return replace(
            self,
            head_dim=self.head_dim or split_width(inner, 64, multiple_of=self.num_groups)[1],
            state_size=self.state_size or power_of_two_width(hidden_size, 128),
        )

    def num_heads(self, hidden_size: int) -> int:
        """Return the number of heads. Raises ValueError where it is not whole."""
        inner = integral(hidden_size * self.expand, "hidden_size * expand")
        return integral(inner / self.head_dim, "hidden_size * expand / head_dim")


def _sizes_of_attention(attention: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the settings with a group of B and C for every head of an attention layer."""
    num_heads, head_dim = attention["num_heads"], attention["head_dim"]
    return {
        "expand": num_heads * head_dim / hidden_size,
        "head_dim": head_dim,
        "state_size": head_dim,
        "num_groups": num_heads,
    }


@register("mamba2")
class Mamba2(Mixer):
    """Mamba-2, as a mixer.

    Its state is the convolutions' last inputs, and S ``[N, H, state_size, head_dim]`` in float32.
    """

    config_class = Mamba2Config
    over_time = "ops"
    mitigable = ALL
    conversion = Conversion(
        _sizes_of_attention, {"x_proj": "v", "b_proj": "k", "c_proj": "q", "o_proj": "o"}
    )
    card = MixerCard(
        "Mamba-2",
        "S_t = a_t S_{t-1} + B_t^T (D_t x_t);  y_t = C_t S_t + D x_t",
        "H N P",
        "chunks (SSD)",
        "arXiv 2405.21060",
    )

    def __init__(self, config: Mamba2Config, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        num_heads = config.num_heads(d)
        self.num_heads = parallel.local(num_heads, "num_heads")
        inner = num_heads * config.head_dim
        self.z_proj = column_linear(parallel, d, inner, context.std)
        self.x_proj = column_linear(parallel, d, inner, context.std)
        for name in "bc":
            projection = group_linear(
                parallel, d, config.num_groups, config.state_size, context.std, "num_groups"
            )
            setattr(self, f"{name}_proj", projection)
        self.groups = max(config.num_groups // parallel.tensor_size, 1)
        self.dt_proj = column_linear(parallel, d, num_heads, context.std, precise=True)
        self.o_proj = row_linear(parallel, inner, d, context.output_std)
        local = self.num_heads * config.head_dim
        size = self.groups * config.state_size
        widths = {"x": local, "b": size, "c": size}
        shared = "bc" if config.num_groups < parallel.tensor_size else ""
        add_short_convolutions(self, parallel, widths, config.conv_size, bias=True, shared=shared)
        self.A_log = gate_parameter(parallel, (self.num_heads,), decay_rate_init(1))
        self.dt_bias = gate_parameter(parallel, (self.num_heads,), time_step_init)
        self.D = gate_parameter(parallel, (self.num_heads,), constant(1.0))
        self.norm = sharded_parameter(parallel, (local,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        inner, b, c = (
            convolve(self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state)
            for name in "xbc"
        )
        repeat = self.num_heads // self.groups
        b, c = (repeat_heads(t.unflatten(-1, (self.groups, -1)), repeat) for t in (b, c))
        inner = inner.unflatten(-1, (self.num_heads, -1))
        step = F.softplus(self.dt_proj(x).to(self.dt_bias.dtype) + self.dt_bias).transpose(0, 1)
        y = recur(
            self,
            linear_attention,
            c,
            b,
            _scaled(inner, step),
            state=state,
            new_state=new_state,
            log_decay=-self.A_log.exp() * step,
            sequences=sequences,
            scale=1.0,
            chunk_size=self.config.chunk_size,
        )
        y = skip_silu_gate(y, inner, self.D[:, None], heads(self.z_proj(x), self.num_heads))
        y = y.flatten(2)
        if self.config.num_groups == 1:
            y = sharded_rms_norm(y, self.norm, self.config.norm_eps, self.parallel)
        else:
            y = _grouped_norm(y, self.norm, self.groups, self.config.norm_eps)
        return self.o_proj(y.transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.config.state_size, self.config.head_dim)
        return {
            **convolution_states(self, self.parallel, batch_size, "xbc"),
            "recurrent": matrix_state(self.parallel, *shape),
        }

    @classmethod
    @override
    def check(cls, config: Mamba2Config, hidden_size: int) -> None:
        num_heads = config.num_heads(hidden_size)
        if num_heads % config.num_groups:
            raise ValueError(
                f"num_groups is {config.num_groups}, which does not divide the {num_heads} heads"
            )

    @classmethod
    @override
    def sharded_counts(cls, config: Mamba2Config, hidden_size: int) -> dict[str, int]:
        return {
            "hidden_size * expand / head_dim": config.num_heads(hidden_size),
            "num_groups": config.num_groups,
        }

    @classmethod
    @override
    def num_parameters(cls, config: Mamba2Config, hidden_size: int) -> int:
        h, shared = config.num_heads(hidden_size), config.num_groups * config.state_size
        inner = h * config.head_dim
        matrices = hidden_size * (3 * inner + 2 * shared + h)
        return (
            matrices
            + (config.conv_size + (config.conv_size > 0)) * (inner + 2 * shared)
            + 3 * h
            + inner
        )

    @classmethod
    @override
    def flops_per_token(cls, config: Mamba2Config, hidden_size: int, seq_len: int) -> int:
        h, shared = config.num_heads(hidden_size), config.num_groups * config.state_size
        matrices = hidden_size * (3 * h * config.head_dim + 2 * shared + h)
        mixing = linear_attention_flops(config.state_size, config.head_dim, config.chunk_size)
        return 2 * matrices + h * mixing

    @classmethod
    @override
    def state_bytes(cls, config: Mamba2Config, hidden_size: int, seq_len: int) -> int:
        h, shared = config.num_heads(hidden_size), config.num_groups * config.state_size
        inner = h * config.head_dim
        return 4 * inner * config.state_size + 2 * max(config.conv_size - 1, 0) * (
            inner + 2 * shared
        )


@fused
def _scaled(x: Tensor, step: Tensor) -> Tensor:
    """Return x ``[..., H, P]`` times step ``[..., H]``, in the step's dtype."""
    return x.to(step.dtype) * step[..., None]


@fused
def _grouped_norm(y: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """Normalise each of ``groups`` parts of y's last axis, times ``weight`` of its full width."""
    return normalised(y.unflatten(-1, (groups, -1)), None, eps).flatten(2) * weight
