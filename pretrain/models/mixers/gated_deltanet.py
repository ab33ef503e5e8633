"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a scalar decay per head.

q, k, v = SiLU(conv(W x)), q and k L2-normalised per head; beta = sigmoid(W_b x) (doubled when
negative eigenvalues are allowed); log decay = -exp(A_log) softplus(W_a x + dt_bias); output
RMSNorm(o) per head, times SiLU(W_g x), through W_o.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data_prep.config_files import setting
from pretrain.models.mixers.base import (
    LayerContext,
    Mixer,
    State,
    accumulation_dtype,
    heads,
    register,
    whole,
)
from pretrain.models.norm import rms_norm
from pretrain.ops import delta_rule, short_convolution
from pretrain.parallel.layers import (
    column_input,
    column_linear,
    constant,
    divided_parameter,
    head_shared,
    replicated_parameter,
    row_linear,
)


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """head_dim: width of a key (K); a value is expand_v times as wide (V); conv_size: taps of the
    short convolution; allow_neg_eigval: beta in (0, 2) instead of (0, 1); chunk_size: sub-steps
    handled at once by the chunked form, which changes speed alone."""

    num_heads: int = setting(6, minimum=1)
    head_dim: int = setting(256, minimum=1)
    expand_v: float = setting(2.0, above=0)
    conv_size: int = setting(4, minimum=1)
    allow_neg_eigval: bool = False
    norm_eps: float = setting(1e-5, above=0)
    chunk_size: int = setting(64, minimum=1)

    @property
    def value_dim(self) -> int:
        return whole(self.head_dim * self.expand_v, "head_dim * expand_v")


@register("gdn")
class GatedDeltaNet(Mixer):
    """State: the convolutions' last inputs, and S ``[N, H, K, V]`` in float32."""

    config_class = GatedDeltaNetConfig

    def __init__(self, config: GatedDeltaNetConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        k_dim = config.num_heads * config.head_dim
        v_dim = config.num_heads * config.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        self.g_proj = column_linear(parallel, d, v_dim, context.std)
        self.a_proj = column_linear(parallel, d, config.num_heads, context.std)
        self.b_proj = column_linear(parallel, d, config.num_heads, context.std)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        for name, dim in (("q", k_dim), ("k", k_dim), ("v", v_dim)):
            shape = (dim // parallel.tensor_size, config.conv_size)
            self.register_parameter(
                f"{name}_conv", divided_parameter(parallel, shape, conv_init, decay=False)
            )
        gates: Any = {"dtype": accumulation_dtype(parallel.dtype), "decay": False}
        self.A_log = divided_parameter(parallel, (self.num_heads,), decay_rate_init, **gates)
        self.dt_bias = divided_parameter(parallel, (self.num_heads,), time_step_init, **gates)
        self.norm = replicated_parameter(parallel, (config.value_dim,), constant(1.0))

    def forward(
        self, x: Tensor, *, cu_seqlens: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel)
        new_state: State = {}
        mixed = []
        for name in "qkv":
            projected = getattr(self, f"{name}_proj")(x)[0].transpose(0, 1)
            y, new_state[f"{name}_conv"] = short_convolution(
                projected, getattr(self, f"{name}_conv"), cu_seqlens=cu_seqlens,
                initial_state=None if state is None else state[f"{name}_conv"],
            )  # fmt: skip
            mixed.append(F.silu(y).unflatten(-1, (self.num_heads, -1)))
        q, k, v = mixed
        dtype = self.A_log.dtype
        log_decay = -self.A_log.exp() * F.softplus(self.a_proj(x)[0].to(dtype) + self.dt_bias)
        beta = self.b_proj(x)[0].to(dtype).sigmoid() * (1 + self.config.allow_neg_eigval)
        y, new_state["recurrent"] = delta_rule(
            l2_norm(q), l2_norm(k), v, beta.transpose(0, 1), log_decay=log_decay.transpose(0, 1),
            cu_seqlens=cu_seqlens, initial_state=None if state is None else state["recurrent"],
            chunk_size=self.config.chunk_size,
        )  # fmt: skip
        gate = heads(self.g_proj(x)[0], self.num_heads)
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps) * F.silu(gate)
        return self.o_proj(y.flatten(2).transpose(0, 1))[0], new_state

    def init_state(self, batch_size: int) -> State:
        config, device = self.config, self.parallel.device
        k_dim, v_dim = self.num_heads * config.head_dim, self.num_heads * config.value_dim
        state = {
            f"{name}_conv": torch.zeros(
                batch_size, config.conv_size - 1, dim, dtype=self.parallel.dtype, device=device
            )
            for name, dim in (("q", k_dim), ("k", k_dim), ("v", v_dim))
        }
        state["recurrent"] = torch.zeros(
            batch_size, self.num_heads, config.head_dim, config.value_dim,
            dtype=accumulation_dtype(self.parallel.dtype), device=device,
        )  # fmt: skip
        return state

    @staticmethod
    def check(config: GatedDeltaNetConfig, hidden_size: int) -> None:
        whole(config.head_dim * config.expand_v, "head_dim * expand_v")

    @staticmethod
    def num_parameters(config: GatedDeltaNetConfig, hidden_size: int) -> int:
        k_dim, v_dim = config.num_heads * config.head_dim, config.num_heads * config.value_dim
        projections = hidden_size * (2 * k_dim + 3 * v_dim + 2 * config.num_heads)
        convolutions = config.conv_size * (2 * k_dim + v_dim)
        return projections + convolutions + 2 * config.num_heads + config.value_dim

    @staticmethod
    def flops_per_token(config: GatedDeltaNetConfig, hidden_size: int, seq_len: int) -> int:
        k, v, h, c = config.head_dim, config.value_dim, config.num_heads, config.chunk_size
        projections = 2 * hidden_size * h * (2 * k + 3 * v + 2)
        return projections + h * (2 * c * (3 * k + 2 * v) + 6 * k * v)

    @staticmethod
    def state_bytes(config: GatedDeltaNetConfig, hidden_size: int, seq_len: int) -> int:
        k, v, h = config.head_dim, config.value_dim, config.num_heads
        return 4 * h * k * v + 2 * (config.conv_size - 1) * h * (2 * k + v)


def l2_norm(x: Tensor) -> Tensor:
    """``x / sqrt(sum x^2 + 1e-6)`` over the last axis, in float32 or wider."""
    wide = x.to(accumulation_dtype(x.dtype))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)


def conv_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform in +-W^-1/2, as torch's Conv1d with one input channel per group."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * shape[-1] ** -0.5


def decay_rate_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """A_log with A uniform in (0, 16)."""
    return (torch.rand(shape, generator=generator) * 16).clamp_min(1e-4).log()


def time_step_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """dt_bias such that softplus(dt_bias) is log-uniform in [1e-3, 1e-1]."""
    low, high = math.log(1e-3), math.log(1e-1)
    dt = (torch.rand(shape, generator=generator) * (high - low) + low).exp().clamp_min(1e-4)
    return dt + torch.log(-torch.expm1(-dt))
