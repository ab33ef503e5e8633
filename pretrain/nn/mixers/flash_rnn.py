"""Classical recurrent layers with head-wise memory mixing (FlashRNN, arXiv 2412.07752): ``lstm``,
``gru``, ``slstm`` (xLSTM, arXiv 2405.04517) and ``elman``; see :mod:`pretrain.ops.rnn`.

x through a projection to each gate; the cell, whose recurrent matrix mixes the channels of a head;
RMSNorm per head, through W_o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import (
    column_input,
    column_linear,
    constant,
    head_shared,
    normal,
    replicated_parameter,
    row_linear,
    sharded_parameter,
)
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    State,
    accumulation_dtype,
    per_head,
    register,
)
from pretrain.nn.mixers.parts import gate_parameter
from pretrain.ops import rnn
from pretrain.ops.elementwise.rms_norm import rms_norm
from pretrain.ops.rnn.cells import CELLS


@dataclass(frozen=True)
class ClassicalRNNConfig:
    """head_dim: channels of a head, null = hidden_size / num_heads; state_grad_clip: bound on the
    gradient carried from step to step, null = none."""

    num_heads: int = setting(4, minimum=1)
    head_dim: int | None = setting(None, minimum=1)
    state_grad_clip: float | None = setting(None, above=0)
    norm_eps: float = setting(1e-5, above=0)

    def dim(self, hidden_size: int) -> int:
        """Channels of a head."""
        return self.head_dim or per_head(hidden_size, self.num_heads)


class ClassicalRNN(Mixer):
    """State: the cell's states, each ``[N, H, D]`` in float32."""

    config_class = ClassicalRNNConfig
    cell: ClassVar[str]
    forget_bias: ClassVar[tuple[int, float, float] | None] = None  # gate, from, to over channels

    def __init__(self, config: ClassicalRNNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, kind = context.hidden_size, context.parallel, CELLS[self.cell]
        self.head_dim = config.dim(d)
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

    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        kind = CELLS[self.cell]
        gates = self.x_proj(x)[0].transpose(0, 1)
        gates = gates.unflatten(-1, (self.num_heads, kind.gates, -1)).transpose(2, 3)
        y, states = rnn(
            gates,
            self.recurrent,
            self.bias.transpose(0, 1),
            cell=self.cell,
            state_grad_clip=self.config.state_grad_clip,
            sequences=sequences,
            initial_state=None if state is None else tuple(state[name] for name in kind.states),
        )
        y = rms_norm(y, head_shared(self.norm, self.parallel), self.config.norm_eps)
        new_state = dict(zip(kind.states, states, strict=True))
        return self.o_proj(y.flatten(2).transpose(0, 1))[0], new_state

    def init_state(self, batch_size: int) -> State:
        kind, shape = CELLS[self.cell], (batch_size, self.num_heads, self.head_dim)
        dtype, device = accumulation_dtype(self.parallel.dtype), self.parallel.device
        return {
            name: torch.full(shape, value, dtype=dtype, device=device)
            for name, value in zip(kind.states, kind.initial, strict=True)
        }

    @classmethod
    def check(cls, config: ClassicalRNNConfig, hidden_size: int) -> None:
        config.dim(hidden_size)

    @classmethod
    def num_parameters(cls, config: ClassicalRNNConfig, hidden_size: int) -> int:
        kind, dim = CELLS[cls.cell], config.dim(hidden_size)
        width = config.num_heads * dim
        return width * (hidden_size * (kind.gates + 1) + kind.gates * dim + kind.biases) + dim

    @classmethod
    def flops_per_token(cls, config: ClassicalRNNConfig, hidden_size: int, seq_len: int) -> int:
        kind, dim = CELLS[cls.cell], config.dim(hidden_size)
        return 2 * config.num_heads * dim * (hidden_size * (kind.gates + 1) + kind.gates * dim)

    @classmethod
    def state_bytes(cls, config: ClassicalRNNConfig, hidden_size: int, seq_len: int) -> int:
        return 4 * len(CELLS[cls.cell].states) * config.num_heads * config.dim(hidden_size)


_SEQUENTIAL = "none: sequential, states kept now and then; a kernel on GPUs"


@register("lstm")
class LSTM(ClassicalRNN):
    """The forget gate's bias starts at 1."""

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
    """The update gate's bias starts at 1: it keeps."""

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
    """The forget gate's bias starts at 3 to 6 over the channels of a head."""

    cell = "slstm"
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
    """The plainest."""

    cell = "elman"
    card = MixerCard("Elman RNN", "h' = tanh(W x + R h)", "H D", _SEQUENTIAL, "arXiv 2412.07752")
