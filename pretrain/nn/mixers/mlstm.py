"""mLSTM (xLSTM, arXiv 2405.04517; as in xLSTM-7B, arXiv 2503.13427): exponential input gates.

    C_t = f_t C_{t-1} + e^{i_t} k_t^T v_t;  n_t = f_t n_{t-1} + e^{i_t} k_t
    o_t = K^-1/2 q_t C_t / max(|K^-1/2 q_t n_t|, 1)

C and n are kept times e^-m, where ``m_t = max(log f_t + m_{t-1}, i_t)``, so that nothing overflows.
That is one linear attention: n is a column of C whose values are 1, e^(i - m) goes into the keys,
and the log-decay is ``log f_t + m_{t-1} - m_t``. The output does not depend on m, which therefore
has no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
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
from pretrain.nn.mixers.mitigations import recur
from pretrain.nn.mixers.parts import (
    borders,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
)
from pretrain.nn.mixers.sizes import heads_for, integral, per_head, split_width
from pretrain.nn.parameters import constant, sharded_parameter
from pretrain.ops import linear_attention
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class MLSTMConfig(MixerConfig):
    """Settings of mLSTM."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a value has 512 channels, a quarter of a
    smaller width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width V of a value; null: ``hidden_size / num_heads``."""
    qk_ratio: float = setting(0.5, above=0)
    """Width K of a key as a multiple of a value's."""
    gate_cap: float | None = setting(15.0, above=0)
    """Input and forget gates are ``cap * tanh(x / cap)`` before their exponential and sigmoid;
    null: they are not bounded."""
    norm_eps: float = setting(1e-6, above=0)
    """Added to the variance in the norm of the output, and to its denominator."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @property
    def key_dim(self) -> int:
        """Return the width K of a key."""
        return integral(self.head_dim * self.qk_ratio, "head_dim * qk_ratio")

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 512, even=True)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        return replace(
            self, num_heads=num_heads, head_dim=head_dim or per_head(hidden_size, num_heads)
        )


@register("mlstm")
class MLSTM(Mixer):
    """mLSTM, as a mixer.

    Its state is C and n, ``[N, H, K, V + 1]`` in float32, and m ``[N, H]`` in float64.
    """

    config_class = MLSTMConfig
    exact_states = ("max",)
    mitigable = ("decay_scale", "write_scale", "window")
    card = MixerCard(
        "mLSTM (xLSTM)",
        "C_t = f_t C_{t-1} + e^{i_t} k_t^T v_t;  o_t = q_t C_t / max(|q_t n_t|, 1)",
        "H K (V + 1)",
        "chunks",
        "arXiv 2405.04517, 2503.13427",
    )

    def __init__(self, config: MLSTMConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        self.key_dim, self.value_dim = config.key_dim, config.head_dim
        k_dim, v_dim = config.num_heads * self.key_dim, config.num_heads * self.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.k_proj = column_linear(parallel, d, k_dim, context.std)
        self.v_proj = column_linear(parallel, d, v_dim, context.std)
        self.g_proj = column_linear(parallel, d, v_dim, context.std)
        # Gates start as constants, the same for every token.
        self.i_proj = column_linear(parallel, d, config.num_heads, 0.0, precise=True)
        self.f_proj = column_linear(parallel, d, config.num_heads, 0.0, precise=True)
        self.i_bias = gate_parameter(parallel, (self.num_heads,), constant(-10.0))
        self.f_bias = gate_parameter(parallel, (self.num_heads,), forget_bias)
        self.norm = sharded_parameter(parallel, (self.num_heads * self.value_dim,), constant(1.0))
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        q, k, v = (heads(getattr(self, f"{name}_proj")(x), self.num_heads) for name in "qkv")
        gates = ((self.i_proj(x), self.i_bias), (self.f_proj(x), self.f_bias))
        i, f = (_capped(gate.transpose(0, 1), bias, self.config.gate_cap) for gate, bias in gates)
        new_state: State = {}
        y = normalized_memory(self, q, k, v, i, f, sequences, state, new_state) * self.norm
        y = torch.sigmoid(self.g_proj(x)) * y.transpose(0, 1)
        return self.o_proj(y), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (self.num_heads, self.key_dim, self.value_dim + 1)
        m = torch.zeros(
            batch_size, self.num_heads, dtype=torch.float64, device=self.parallel.device
        )
        return {"recurrent": matrix_state(self.parallel, batch_size, *shape), "max": m}

    @classmethod
    @override
    def check(cls, config: MLSTMConfig, hidden_size: int) -> None:
        integral(config.head_dim * config.qk_ratio, "head_dim * qk_ratio")

    @classmethod
    @override
    def num_parameters(cls, config: MLSTMConfig, hidden_size: int) -> int:
        widths = 2 * config.key_dim + 3 * config.head_dim + 2
        return config.num_heads * (hidden_size * widths + 2 + config.head_dim)

    @classmethod
    @override
    def flops_per_token(cls, config: MLSTMConfig, hidden_size: int, seq_len: int) -> int:
        widths = 2 * config.key_dim + 3 * config.head_dim + 2
        mixing = linear_attention_flops(config.key_dim, config.head_dim + 1, config.chunk_size)
        return config.num_heads * (2 * hidden_size * widths + mixing)

    @classmethod
    @override
    def state_bytes(cls, config: MLSTMConfig, hidden_size: int, seq_len: int) -> int:
        return config.num_heads * (4 * config.key_dim * (config.head_dim + 1) + 8)


def normalized_memory(
    mixer: Mixer,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    sequences: Sequences | None,
    state: State | None,
    new_state: State,
) -> Tensor:
    """Return what q reads of mLSTM's memory, ``[B, T, H * V]`` of mean 0 and variance 1 per head.

    q, k, v ``[B, T, H, dim]``; i and f ``[B, T, H]`` are the gates before their exponential and
    sigmoid, in float64. ``mixer.config`` has ``norm_eps`` and ``chunk_size``. The state's entries
    ``recurrent`` and ``max`` go into ``new_state``.
    """
    log_f, wanted = F.logsigmoid(f), mixer.mitigations
    if wanted is not None:  # of the gates, not of what the stabilizer makes of them
        log_f, i = log_f * wanted.decay_scale, i + math.log(wanted.write_scale)
    mixer.note(log_decay=log_f)
    config: Any = mixer.config
    dtype = accumulation_dtype(q.dtype)
    m, new_state["max"], change = _stabilizer(
        i, log_f, sequences, None if state is None else state["max"]
    )
    y = recur(
        mixer,
        linear_attention,
        q,
        k * (i - m).exp()[..., None].to(k.dtype),
        torch.cat([v, torch.ones_like(v[..., :1])], -1),
        state=state,
        new_state=new_state,
        log_decay=(log_f + change).to(dtype),
        sequences=sequences,
        gates_scaled=True,
        chunk_size=config.chunk_size,
    )
    return _normalized(y, (-m)[..., None].to(dtype), config.norm_eps).flatten(2)


def forget_bias(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return biases from 3 to 6 over heads: memories of some ten to some hundred tokens."""
    return torch.linspace(3.0, 6.0, shape[0])


@fused
def _capped(gate: Tensor, bias: Tensor, cap: float | None) -> Tensor:
    """Return a gate before its nonlinearity, ``[B, T, H]`` in float64."""
    gate = gate.double() + bias.double()
    return gate if cap is None else cap * torch.tanh(gate / cap)


@torch.no_grad()
def _stabilizer(
    i: Tensor, log_f: Tensor, sequences: Sequences | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m ``[B, T, H]``, that of each sequence's last token ``[N, H]``, and its decrease.

    i and log_f ``[B, T, H]`` are in float64, in which sums over long sequences stay exact enough:
    in float32 outputs with small denominators are off by percents after 1,000 tokens. ``before``
    ``[N, H]`` is m before the first tokens, 0 without. The decrease ``m_{t-1} - m_t``, at most
    -log_f, is what makes a log-decay of log_f.
    """
    shape = i.shape
    if sequences is None:
        sequences = Sequences.of_rows(shape[0], shape[1], i.device)
    owners, first, last = sequences.derive(borders)
    if before is None:
        before = i.new_zeros(sequences.count, shape[2])
    entering = before[owners]
    # m is a scan of maps m -> max(a + m, b), doubling the tokens that each spans.
    a, b = log_f.flatten(0, 1).clone(), i.flatten(0, 1).clone()
    b[first] = torch.maximum(b[first], a[first] + entering)
    a[first] = -torch.inf  # nothing from other sequences
    span = 1
    while span < sequences.max_length:
        b[span:] = torch.maximum(b[span:], a[span:] + b[:-span])
        a[span:] = a[span:] + a[:-span]
        span *= 2
    earlier = torch.cat([b[:1], b[:-1]])
    earlier[first] = entering
    ended = before.clone()
    ended[owners] = b[last]
    m = b.view(shape)
    return m, ended, torch.minimum(earlier.view(shape) - m, -log_f)


@fused
def _normalized(y: Tensor, minus_m: Tensor, eps: float) -> Tensor:
    """Return ``y / max(|n|, e^-m)`` without mean and of unit variance; n is y's last column."""
    wide = y.to(minus_m.dtype)
    divisor = torch.maximum(wide[..., -1:].abs(), minus_m.exp()) + 1e-6
    wide = wide[..., :-1] / divisor
    return F.layer_norm(wide, wide.shape[-1:], eps=eps).to(y.dtype)
