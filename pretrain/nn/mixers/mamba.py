"""Mamba (S6, arXiv 2312.00752): a state-space model whose step, input and output follow the token.

    u = SiLU(conv(W_u x));   D_t = softplus(W_D' W_D u_t + dt_bias);   B_t, C_t = W_B u_t, W_C u_t
    h_t = exp(-exp(A_log) D_t) h_{t-1} + D_t B_t u_t;   y_t = C_t h_t + D u_t
    out = W_o (y * SiLU(W_z x))

Every channel of u has N states with decays of their own, and all channels share B and C: linear
attention of a head for each channel, with N channels of a key and one of a value. Models of it
alone have no MLP (``mlp: {kind: none}``) and twice the blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import LayerContext, Mixer, MixerCard, MixerConfig, State, register
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
    power_of_two,
    time_step_init,
)
from pretrain.nn.mixers.sizes import integral
from pretrain.nn.parameters import change_info, constant, matrix_parameter
from pretrain.ops import linear_attention
from pretrain.ops.across import crossing
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import skip_silu_gate
from pretrain.ops.shared.recomputation import recomputed, recomputing
from pretrain.parallel.collectives import copy_to_tensor_parallel, reduce_from_tensor_parallel


@dataclass(frozen=True)
class MambaConfig(MixerConfig):
    """Settings of Mamba."""

    head_sizes: ClassVar[tuple[str, ...]] = ("state_size",)
    head_counts: ClassVar[tuple[str, ...]] = ("dt_rank",)  # grows with the width as they do

    expand: float = setting(2.0, above=0)
    """Channels I of the recurrence as a multiple of the model's width."""
    state_size: int = setting(16, minimum=1)
    """States N of a channel."""
    dt_rank: Derived = setting(None, minimum=1)
    """Rank of the projection to the channels' time steps; null: a sixteenth of the model's width,
    rounded up."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution; 0: there is none."""
    chunk_size: int = setting(16, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed and memory
    alone: as many numbers are kept for each token and channel."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        return replace(self, dt_rank=self.dt_rank or -(-hidden_size // 16))

    def width(self, hidden_size: int) -> int:
        """Return I. Raises ValueError where it is not whole."""
        return integral(hidden_size * self.expand, "hidden_size * expand")


@register("mamba")
class Mamba(Mixer):
    """Mamba, as a mixer.

    Its state is the convolution's last inputs, and h ``[N, I, state_size, 1]`` in float32.
    """

    config_class = MambaConfig
    over_time = "ops"
    card = MixerCard(
        "Mamba (S6)",
        "h_t = exp(D_t A) h_{t-1} + D_t B_t u_t;  y_t = C_t h_t + D u_t, for each channel",
        "I N",
        "chunks, pairs by halving",
        "arXiv 2312.00752",
        sharded="I",
    )

    def __init__(self, config: MambaConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, width = (
            context.hidden_size,
            context.parallel,
            config.width(context.hidden_size),
        )
        self.width = parallel.local(width, "hidden_size * expand")
        rank, size = config.dt_rank, config.state_size
        self.z_proj = column_linear(parallel, d, width, context.std)
        self.x_proj = column_linear(parallel, d, width, context.std)
        add_short_convolutions(self, parallel, {"x": self.width}, config.conv_size, bias=True)
        # From channels that are divided over ranks to what all of them need.
        self.dt_down = matrix_parameter(parallel, (rank, self.width), context.std, 1)
        self.b_weight, self.c_weight = (
            matrix_parameter(parallel, (size, self.width), context.std, 1, role="bottleneck")
            for _ in "bc"
        )
        dt_up = matrix_parameter(parallel, (self.width, rank), 1.0, 0)
        # Uniform in +-rank^-1/2; by the rank of the base model, for its role makes the rest.
        self.dt_up = change_info(dt_up, init=_Uniform((rank / parallel.width) ** -0.5))
        self.dt_bias = gate_parameter(parallel, (self.width,), time_step_init)
        self.A_log = gate_parameter(parallel, (self.width, size), _count_up)
        self.D = gate_parameter(parallel, (self.width,), constant(1.0))
        self.o_proj = row_linear(parallel, width, d, context.output_std)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        u = convolve(self, "x", self.x_proj(x), sequences, state, new_state)
        step, b, c = self._selected(u)
        given = None if state is None else state["recurrent"]
        scanned = (
            step,
            self.dt_bias,
            self.A_log,
            u,
            b,
            c,
            given,
            sequences,
            self.config.chunk_size,
        )
        if self.watch is not None:  # which the scan makes for itself
            with torch.no_grad():
                self.note(log_decay=_discretised(step, self.dt_bias, self.A_log, u)[0])
        if sequences is None or crossing(sequences) is None:
            # States of all tokens are N times as large as all else: they are computed again.
            with recomputing():
                y, new_state["recurrent"] = recomputed(_scan, *scanned)
        else:  # what communicates runs once
            y, new_state["recurrent"] = _scan(*scanned)
        y = skip_silu_gate(y, u, self.D, self.z_proj(x).transpose(0, 1))
        return self.o_proj(y.transpose(0, 1)), new_state

    def _selected(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the step before its bias ``[B, T, I]``, and B and C ``[B, T, N]``, of u."""
        weight = torch.cat([self.dt_down, self.b_weight, self.c_weight])
        # A sum over all channels; every rank uses it for its own, whose gradients add up.
        found = reduce_from_tensor_parallel(F.linear(u, weight), self.parallel.group)
        found = copy_to_tensor_parallel(found, self.parallel.group)
        step, b, c = found.split([len(self.dt_down), len(self.b_weight), len(self.c_weight)], -1)
        return F.linear(step, self.dt_up), b, c

    @override
    def init_state(self, batch_size: int) -> State:
        return {
            **convolution_states(self, self.parallel, batch_size, "x"),
            "recurrent": matrix_state(
                self.parallel, batch_size, self.width, self.config.state_size, 1
            ),
        }

    @classmethod
    @override
    def check(cls, config: MambaConfig, hidden_size: int) -> None:
        config.width(hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def sharded_counts(cls, config: MambaConfig, hidden_size: int) -> dict[str, int]:
        return {"hidden_size * expand": config.width(hidden_size)}

    @classmethod
    @override
    def num_parameters(cls, config: MambaConfig, hidden_size: int) -> int:
        columns = 3 * hidden_size + 2 * config.dt_rank + 2 * config.state_size
        vectors = config.state_size + 2 + config.conv_size + (config.conv_size > 0)
        return config.width(hidden_size) * (columns + vectors)

    @classmethod
    @override
    def flops_per_token(cls, config: MambaConfig, hidden_size: int, seq_len: int) -> int:
        columns = 3 * hidden_size + 2 * config.dt_rank + 2 * config.state_size
        mixing = linear_attention_flops(config.state_size, 1, config.chunk_size, per_channel=True)
        return config.width(hidden_size) * (2 * columns + mixing)

    @classmethod
    @override
    def state_bytes(cls, config: MambaConfig, hidden_size: int, seq_len: int) -> int:
        numbers = 4 * config.state_size + 2 * max(config.conv_size - 1, 0)
        return config.width(hidden_size) * numbers


def selective_scan(
    v: Tensor,
    log_decay: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    initial_state: Tensor | None = None,
    sequences: Sequences | None = None,
    chunk_size: int = 16,
) -> tuple[Tensor, Tensor]:
    """Return y ``[B, T, I]`` of ``h_t = exp(log_decay_t) h_{t-1} + b_t v_t``, ``y_t = c_t h_t``.

    v ``[B, T, I]``; log_decay ``[B, T, I, N]``; b, c ``[B, T, N]``; also returns the last h
    ``[B, I, N, 1]``.
    """
    b, c = (t[:, :, None].expand(-1, -1, v.shape[2], -1) for t in (b, c))
    y, state = linear_attention(
        c,
        b,
        v[..., None],
        log_decay=log_decay,
        scale=1.0,
        initial_state=initial_state,
        sequences=sequences,
        chunk_size=chunk_size,
    )
    return y[..., 0], state


def _scan(
    step: Tensor,
    bias: Tensor,
    rate_log: Tensor,
    u: Tensor,
    b: Tensor,
    c: Tensor,
    initial_state: Tensor | None,
    sequences: Sequences | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return :func:`selective_scan` of u, with decays of the steps."""
    log_decay, v = _discretised(step, bias, rate_log, u)
    return selective_scan(
        v,
        log_decay,
        b.to(v.dtype),
        c.to(v.dtype),
        initial_state=initial_state,
        sequences=sequences,
        chunk_size=chunk_size,
    )


@fused
def _discretised(step: Tensor, bias: Tensor, rate_log: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Return log-decays ``[B, T, I, N]`` and what goes in ``[B, T, I]``, in the bias's dtype."""
    step = F.softplus(step.to(bias.dtype) + bias)
    return -rate_log.exp() * step[..., None], step * u.to(bias.dtype)


def _count_up(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return A_log with A = 1, 2, ..., N in every channel (S4D-Real)."""
    return torch.arange(1.0, shape[1] + 1).log().expand(shape)


@dataclass(frozen=True)
class _Uniform:
    """Draw uniformly within +-bound; a class, so that models can be pickled."""

    bound: float

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return (torch.rand(shape, generator=generator) * 2 - 1) * self.bound
