"""M2RNN (arXiv 2603.14360): a matrix-valued state with a tanh and a full recurrent matrix.

q, k (few heads, shared) and v pass convolution and SiLU; forget gate f = exp(-exp(A_log)
softplus(W_f x + dt_bias)) per head; y = q H + D * v, times SiLU(W_g x), RMSNorm over the full
width, through W_o.

The recurrent matrices start at the identity, as in the published language models, or Gaussian with
variance 1 / V, as in the authors' module of the layer alone. The identity keeps and adds up; for
state tracking the Gaussian start is much better (benchmarks/results/synthetic_suite_cpu.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch
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
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    decay_rate_init,
    forget_gate,
    gate_parameter,
    matrix_state,
    time_step_init,
)
from pretrain.nn.mixers.sizes import heads_for, power_of_two_width
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, normal, sharded_parameter
from pretrain.ops import m2rnn
from pretrain.ops.elementwise.gating import skip_silu_gate


@dataclass(frozen=True)
class M2RNNConfig(MixerConfig):
    """Settings of M2RNN."""

    head_sizes: ClassVar[tuple[str, ...]] = ("head_dim", "value_dim")

    num_heads: Derived = setting(None, minimum=1)
    """Heads of values, gates and recurrent matrices; null: as many as make the values of all heads
    together about 1.3 times as wide as the model (84 of 16 at 1024, as published), a multiple of
    four."""
    num_qk_heads: int = setting(1, minimum=1)
    """Heads of queries and of keys, a divisor of ``num_heads``."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: the largest power of two that is at most 64 and a quarter of the
    model's width."""
    value_dim: Derived = setting(None, minimum=1)
    """Width V of a value, and of a head's recurrent matrix; null: the largest power of two that is
    at most 16 and a quarter of the model's width."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries, keys and values; 0: there is none."""
    recurrent_init: Literal["identity", "normal"] = setting("identity")
    """Initial recurrent matrices: the identity, or Gaussian with variance 1 / V."""
    state_grad_clip: float | None = setting(1.0, above=0)
    """Bound on every element of the gradient that is carried from step to step; null: none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        value_dim = self.value_dim or power_of_two_width(hidden_size, 16)
        multiple_of = math.lcm(4, self.num_qk_heads)
        return replace(
            self,
            num_heads=self.num_heads or heads_for(21 / 16 * hidden_size, value_dim, multiple_of),
            head_dim=self.head_dim or power_of_two_width(hidden_size, 64),
            value_dim=value_dim,
        )


@register("m2rnn")
class M2RNN(Mixer):
    """M2RNN, as a mixer.

    Its state is the convolutions' last inputs, and H ``[N, H, K, V]`` in float32.
    """

    config_class = M2RNNConfig
    over_time = "cells"
    card = MixerCard(
        "M2RNN",
        "H_t = f_t H_{t-1} + (1 - f_t) tanh(H_{t-1} W + k_t^T v_t);  y_t = q_t H_t",
        "H K V",
        "sequential, a checkpoint of the state every few tokens; kernels on GPUs and CPUs",
        "arXiv 2603.14360",
    )

    def __init__(self, config: M2RNNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        v_dim, local = config.num_heads * config.value_dim, self.num_heads * config.value_dim
        for name in "qk":
            projection = group_linear(
                parallel, d, config.num_qk_heads, config.head_dim, context.std, "num_qk_heads"
            )
            setattr(self, f"{name}_proj", projection)
        self.qk_heads = max(config.num_qk_heads // parallel.tensor_size, 1)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        self.g_proj = column_linear(parallel, d, v_dim, context.std)
        self.f_proj = column_linear(parallel, d, config.num_heads, context.std, precise=True)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        size = self.qk_heads * config.head_dim
        widths = {"q": size, "k": size, "v": local}
        shared = "qk" if config.num_qk_heads < parallel.tensor_size else ""
        add_short_convolutions(self, parallel, widths, config.conv_size, shared=shared)
        self.A_log = gate_parameter(parallel, (self.num_heads,), decay_rate_init())
        self.dt_bias = gate_parameter(parallel, (self.num_heads,), time_step_init)
        self.D = gate_parameter(parallel, (self.num_heads, config.value_dim), constant(1.0))
        shape = (self.num_heads, config.value_dim, config.value_dim)
        start = _identity if config.recurrent_init == "identity" else normal(shape[-1] ** -0.5)
        self.recurrent = sharded_parameter(parallel, shape, start)
        self.norm = sharded_parameter(parallel, (local,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k, v = (
            convolve(self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state)
            for name in "qkv"
        )
        q, k = (t.unflatten(-1, (self.qk_heads, -1)) for t in (q, k))
        v = v.unflatten(-1, (self.num_heads, -1))
        forget = forget_gate(self.f_proj(x), self.A_log, self.dt_bias).transpose(0, 1)
        self.note(log_decay=forget.log() if self.watch is not None else None)
        y, new_state["recurrent"] = m2rnn(
            q,
            k,
            v,
            self.recurrent,
            forget,
            sequences=sequences,
            state_grad_clip=self.config.state_grad_clip,
            initial_state=None if state is None else state["recurrent"],
        )
        y = skip_silu_gate(y, v, self.D, heads(self.g_proj(x), self.num_heads))
        y = sharded_rms_norm(y.flatten(2), self.norm, self.config.norm_eps, self.parallel)
        return self.o_proj(y.transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        config = self.config
        return {
            **convolution_states(self, self.parallel, batch_size, "qkv"),
            "recurrent": matrix_state(
                self.parallel, batch_size, self.num_heads, config.head_dim, config.value_dim
            ),
        }

    @classmethod
    @override
    def check(cls, config: M2RNNConfig, hidden_size: int) -> None:
        if config.num_heads % config.num_qk_heads:
            raise ValueError(
                f"num_qk_heads is {config.num_qk_heads}, which does not divide num_heads "
                f"{config.num_heads}"
            )

    @classmethod
    @override
    def sharded_counts(cls, config: M2RNNConfig, hidden_size: int) -> dict[str, int]:
        return {"num_heads": config.num_heads, "num_qk_heads": config.num_qk_heads}

    @classmethod
    @override
    def num_parameters(cls, config: M2RNNConfig, hidden_size: int) -> int:
        n, v = config.num_heads, config.value_dim
        shared = 2 * config.num_qk_heads * config.head_dim
        matrices = hidden_size * (shared + 3 * n * v + n)
        return matrices + config.conv_size * (shared + n * v) + 2 * n + 2 * n * v + n * v * v

    @classmethod
    @override
    def flops_per_token(cls, config: M2RNNConfig, hidden_size: int, seq_len: int) -> int:
        n, k, v = config.num_heads, config.head_dim, config.value_dim
        matrices = hidden_size * (2 * config.num_qk_heads * k + 3 * n * v + n)
        return 2 * matrices + n * (2 * k * v * v + 2 * k * v)

    @classmethod
    @override
    def state_bytes(cls, config: M2RNNConfig, hidden_size: int, seq_len: int) -> int:
        n, k, v = config.num_heads, config.head_dim, config.value_dim
        convolved = 2 * config.num_qk_heads * k + n * v
        return 4 * n * k * v + 2 * max(config.conv_size - 1, 0) * convolved


def _identity(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.eye(shape[-1]).expand(shape).clone()
