"""Classical recurrent layers with head-wise memory mixing (FlashRNN, arXiv 2412.07752).

They are ``lstm``, ``gru``, ``slstm`` (xLSTM, arXiv 2405.04517) and ``elman``; see
:mod:`pretrain.ops.rnn`. x goes through a projection to each gate; then the cell, whose recurrent
matrix mixes the channels of a head; then RMSNorm per head, through W_o.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
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
    accumulation_dtype,
    register,
)
from pretrain.nn.mixers.parts import gate_parameter
from pretrain.nn.mixers.sizes import few_heads
from pretrain.nn.parameters import constant, normal, replicated_parameter, sharded_parameter
from pretrain.ops import rnn
from pretrain.ops.elementwise.rms_norm import rms_norm
from pretrain.ops.rnn.cells import CELLS


@dataclass(frozen=True)
class ClassicalRNNConfig(MixerConfig):
    """Settings of the recurrent networks with a recurrent matrix per head."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: four, or three, two or one where four do not divide the model's width."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a head; null: ``hidden_size / num_heads``."""
    state_grad_clip: float | None = setting(None, above=0)
    """Bound on every element of the gradient that is carried from step to step; null: none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = few_heads(hidden_size, self.num_heads, self.head_dim)
        return replace(self, num_heads=num_heads, head_dim=head_dim)


class ClassicalRNN(Mixer):
    """A classical recurrent cell, as a mixer.

    Its state is the cell's states, each ``[N, H, D]`` in float32.
    """

    config_class = ClassicalRNNConfig
    over_time = "cells"
    cell: ClassVar[str]
    forget_bias: ClassVar[tuple[int, float, float] | None] = None  # gate, from, to over channels

    def __init__(self, config: ClassicalRNNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, kind = context.hidden_size, context.parallel, CELLS[self.cell]
        self.head_dim = config.head_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width = config.num_heads * self.head_dim
        self.x_proj = column_linear(parallel, d, kind.gates * width, context.std)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        self.recurrent = sharded_parameter(
            parallel,
            (self.num_heads, self.head_dim, kind.gates, self.head_dim),
            normal(self.head_dim**-0.5),
        )
        self.bias = gate_parameter(
            parallel, (self.num_heads, kind.biases, self.head_dim), self._bias_init
        )
        self.norm = replicated_parameter(parallel, (self.head_dim,), constant(1.0))

    @classmethod
    def _bias_init(cls, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bias = torch.zeros(shape)
        if cls.forget_bias is not None:
            gate, low, high = cls.forget_bias
            bias[:, gate] = torch.linspace(low, high, shape[2])
        return bias

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        kind = CELLS[self.cell]
        gates = self.x_proj(x).transpose(0, 1)
        gates = gates.unflatten(-1, (self.num_heads, kind.gates, -1)).transpose(2, 3)
        y, states = rnn(
            gates,
            self.recurrent,
            self.bias.transpose(0, 1),
            cell=self.cell,
            state_grad_clip=self.config.state_grad_clip,
            sequences=sequences,
            initial_state=None if state is None else tuple(state[name] for name in kind.states),
            watch=self.watch,
        )
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps)
        new_state = dict(zip(kind.states, states, strict=True))
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    @override
    def memory(self, state: State) -> Tensor | None:
        return state.get("c", state.get("h"))

    @override
    def init_state(self, batch_size: int) -> State:
        kind, shape = CELLS[self.cell], (batch_size, self.num_heads, self.head_dim)
        dtype, device = accumulation_dtype(self.parallel.dtype), self.parallel.device
        return {
            name: torch.full(shape, value, dtype=dtype, device=device)
            for name, value in zip(kind.states, kind.initial, strict=True)
        }

    @classmethod
    @override
    def num_parameters(cls, config: ClassicalRNNConfig, hidden_size: int) -> int:
        kind, dim = CELLS[cls.cell], config.head_dim
        width = config.num_heads * dim
        return width * (hidden_size * (kind.gates + 1) + kind.gates * dim + kind.biases) + dim

    @classmethod
    @override
    def flops_per_token(cls, config: ClassicalRNNConfig, hidden_size: int, seq_len: int) -> int:
        kind, dim = CELLS[cls.cell], config.head_dim
        return 2 * config.num_heads * dim * (hidden_size * (kind.gates + 1) + kind.gates * dim)

    @classmethod
    @override
    def state_bytes(cls, config: ClassicalRNNConfig, hidden_size: int, seq_len: int) -> int:
        return 4 * len(CELLS[cls.cell].states) * config.num_heads * config.head_dim


_SEQUENTIAL = "none: sequential, states kept now and then; a kernel on GPUs"


@register("lstm")
class LSTM(ClassicalRNN):
    """LSTM whose forget gate's bias starts at 1."""

    cell = "lstm"
    forget_bias = (1, 1.0, 1.0)
    card = MixerCard(
        "LSTM",
        "c' = sigmoid(f) c + sigmoid(i) tanh(z); h' = sigmoid(o) tanh(c'), gates W x + R h",
        "2 H D",
        _SEQUENTIAL,
        "arXiv 2412.07752",
    )


@register("gru")
class GRU(ClassicalRNN):
    """GRU whose update gate's bias starts at 1, so that it keeps its state."""

    cell = "gru"
    forget_bias = (1, 1.0, 1.0)
    card = MixerCard(
        "GRU",
        "h' = u h + (1 - u) tanh(W x + s (R h)); u, s = sigmoid(W x + R h)",
        "H D",
        _SEQUENTIAL,
        "arXiv 1406.1078; 2412.07752",
    )


@register("slstm")
class SLSTM(ClassicalRNN):
    """sLSTM whose forget gate's bias starts at 3 to 6 over the channels of a head."""

    cell = "slstm"
    exact_states = ("n", "m")
    forget_bias = (1, 3.0, 6.0)
    card = MixerCard(
        "sLSTM",
        "c' = sigmoid(f) c + exp(i) tanh(z); n' = sigmoid(f) n + exp(i); "
        "h' = sigmoid(o) c' / n', gates W x + R h",
        "4 H D",
        _SEQUENTIAL,
        "arXiv 2405.04517",
    )


@register("elman")
class Elman(ClassicalRNN):
    """Elman's network, without gates."""

    cell = "elman"
    card = MixerCard("Elman RNN", "h' = tanh(W x + R h)", "H D", _SEQUENTIAL, "arXiv 2412.07752")
