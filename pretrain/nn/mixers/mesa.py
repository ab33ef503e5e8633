"""MesaNet (arXiv 2506.05233): reads are ridge regressions of past values on past keys.

    Phi_t = a_t Phi_{t-1} + b_t k_t^T k_t;  Psi_t = a_t Psi_{t-1} + b_t k_t^T v_t
    o_t = q_t (Phi_t + Diag(ridge))^-1 Psi_t

a and b are sigmoids of a number per head; q and k are convolved and of length 1. The systems of all
tokens are solved by conjugate gradients, each iteration of the cost of a linear attention: at 30 of
them the recurrence costs as much as 30 layers'. RMSNorm per head, through W_o.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Self

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, head_shared, row_linear
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
    gate_parameter,
    l2_norm,
    linear_attention_flops,
    matrix_state,
)
from pretrain.nn.mixers.sizes import delta_rule_sizes
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import mesa
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import biased_sigmoid
from pretrain.ops.elementwise.rms_norm import rms_norm


@dataclass(frozen=True)
class MesaConfig(MixerConfig):
    """Settings of MesaNet."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as many as make the keys of all heads together as wide as the model."""
    head_dim: Derived = setting(None, minimum=1)
    """Width of a key and of a value; null: the largest power of two that is at most 128 and a
    quarter of the model's width, or with ``num_heads`` given the head's share of the keys."""
    iterations: int = setting(30, minimum=1)
    """Steps of conjugate gradients for each token's system, forward and once more backward. Fewer
    are cheaper and solve less exactly; as many as a key is wide are exact but for rounding."""
    ridge_floor: float = setting(0.25, above=0)
    """Least value of the ridge, which is learned for each key channel; it starts at 1, or at 1 more
    than a floor that is no less."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries and keys; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        sizes = delta_rule_sizes(hidden_size, self.num_heads, self.head_dim, 1.0, 128)
        return replace(self, num_heads=sizes[0], head_dim=sizes[1])


@register("mesa")
class Mesa(Mixer):
    """MesaNet's layer, as a mixer.

    Its state is the convolutions' last inputs, and Phi and Psi ``[N, H, K, K]`` in float32.
    """

    config_class = MesaConfig
    card = MixerCard(
        "MesaNet",
        "Phi_t = a_t Phi_{t-1} + b_t k_t^T k_t, Psi_t with v_t;  o_t = q_t (Phi_t + R)^{-1} Psi_t",
        "2 H K K",
        "conjugate gradients, each iteration in chunks",
        "arXiv 2506.05233",
    )

    def __init__(self, config: MesaConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, dim = context.hidden_size, context.parallel, config.head_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width, local = config.num_heads * dim, self.num_heads * dim
        self.q_proj = column_linear(parallel, d, width, context.std)
        self.k_proj = column_linear(parallel, d, width, context.std)
        self.v_proj = column_linear(parallel, d, width, context.std)
        self.a_proj = column_linear(parallel, d, config.num_heads, context.std, precise=True)
        self.b_proj = column_linear(parallel, d, config.num_heads, context.std, precise=True)
        self.a_bias = gate_parameter(parallel, (self.num_heads,), constant(0.0))
        self.b_bias = gate_parameter(parallel, (self.num_heads,), constant(0.0))
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        add_short_convolutions(self, parallel, dict.fromkeys("qk", local), config.conv_size)
        above = 1 - config.ridge_floor if config.ridge_floor < 1 else 1.0
        start = constant(math.log(math.expm1(above)))
        self.ridge = gate_parameter(parallel, (local,), start)
        self.norm = replicated_parameter(parallel, (dim,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k = (
            convolve(
                self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state
            ).unflatten(-1, (self.num_heads, -1))
            for name in "qk"
        )
        beta = biased_sigmoid(self.b_proj(x), self.b_bias).transpose(0, 1)
        log_decay = _log_sigmoid(self.a_proj(x), self.a_bias).transpose(0, 1)
        self.note(log_decay=log_decay, beta=beta)
        y, last = mesa(
            l2_norm(q),
            l2_norm(k),
            heads(self.v_proj(x), self.num_heads),
            beta,
            _ridge(self.ridge, self.config.ridge_floor).unflatten(0, (self.num_heads, -1)),
            log_decay=log_decay,
            iterations=self.config.iterations,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else (state["covariance"], state["recurrent"]),
        )
        new_state["covariance"], new_state["recurrent"] = last
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        dim = self.config.head_dim
        matrices = {
            name: matrix_state(self.parallel, batch_size, self.num_heads, dim, dim)
            for name in ("covariance", "recurrent")
        }
        return {**convolution_states(self, self.parallel, batch_size, "qk"), **matrices}

    @classmethod
    @override
    def num_parameters(cls, config: MesaConfig, hidden_size: int) -> int:
        h, dim = config.num_heads, config.head_dim
        vectors = 2 * config.conv_size * h * dim + 2 * h + h * dim + dim
        return hidden_size * (4 * h * dim + 2 * h) + vectors

    @classmethod
    @override
    def flops_per_token(cls, config: MesaConfig, hidden_size: int, seq_len: int) -> int:
        h, dim, chunk = config.num_heads, config.head_dim, config.chunk_size
        solving = config.iterations * (4 * chunk * dim + 2 * dim * dim) + 2 * dim * dim
        mixing = solving + 2 * linear_attention_flops(dim, dim, chunk)
        return 2 * hidden_size * (4 * h * dim + 2 * h) + h * mixing

    @classmethod
    @override
    def state_bytes(cls, config: MesaConfig, hidden_size: int, seq_len: int) -> int:
        h, dim = config.num_heads, config.head_dim
        return 8 * h * dim * dim + 2 * max(config.conv_size - 1, 0) * 2 * h * dim


@fused
def _log_sigmoid(x: Tensor, bias: Tensor) -> Tensor:
    """Return log sigmoid(x + bias) in the bias's dtype."""
    return F.logsigmoid(x.to(bias.dtype) + bias)


def _ridge(raw: Tensor, floor: float) -> Tensor:
    return F.softplus(raw) + floor
