"""Quasi-LSTM (Languini, arXiv 2309.11197): an LSTM whose gates see the input alone.

    c_t = sigmoid(W_f x_t + b_f) c_{t-1} + sigmoid(W_i x_t + b_i) tanh(W_z x_t + b_z)
    y_t = W_o (sigmoid(W_g x_t + b_g) tanh(c_t)) + b_o

elementwise over all channels, so that c is a scan over time. It is made for training on a stream,
``train.carry_state: true``, with an MLP of GELU after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import LayerContext, Mixer, MixerCard, MixerConfig, State, register
from pretrain.nn.mixers.parts import gate_parameter, matrix_state
from pretrain.nn.mixers.sizes import integral
from pretrain.nn.parameters import constant, replicated_parameter, used_on_local_tokens
from pretrain.ops import diagonal_scan
from pretrain.ops.elementwise.fusing import fused


@dataclass(frozen=True)
class QuasiLSTMConfig(MixerConfig):
    """Settings of the quasi-LSTM."""

    head_sizes: ClassVar[tuple[str, ...]] = ()  # there are no heads

    expand: float = setting(1.0, above=0)
    """Channels D of the cell as a multiple of the model's width."""
    forget_bias: float = setting(1.0)
    """What the bias of the forget gate starts at."""

    def width(self, hidden_size: int) -> int:
        """Return D. Raises ValueError where it is not whole."""
        return integral(hidden_size * self.expand, "hidden_size * expand")


@register("quasi_lstm")
class QuasiLSTM(Mixer):
    """The quasi-LSTM, as a mixer.

    Its state is c ``[N, D]`` in float32.
    """

    config_class = QuasiLSTMConfig
    over_time = "ops"
    card = MixerCard(
        "quasi-LSTM",
        "c' = sigmoid(f) c + sigmoid(i) tanh(z);  y = sigmoid(g) tanh(c'), gates W x + b",
        "D",
        "scan, chunks side by side",
        "arXiv 2309.11197",
        sharded="D",
    )
    i_bias: Tensor
    f_bias: Tensor
    z_bias: Tensor
    g_bias: Tensor

    def __init__(self, config: QuasiLSTMConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, width = (
            context.hidden_size,
            context.parallel,
            config.width(context.hidden_size),
        )
        self.width = parallel.local(width, "hidden_size * expand")
        starts = {"i": 0.0, "f": config.forget_bias, "z": 0.0, "g": 0.0}
        for name, start in starts.items():
            setattr(self, f"{name}_proj", column_linear(parallel, d, width, context.std))
            bias = gate_parameter(parallel, (self.width,), constant(start))
            self.register_parameter(f"{name}_bias", bias)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        o_bias = replicated_parameter(parallel, (d,), constant(0.0))
        self.o_bias = used_on_local_tokens(o_bias, parallel)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        i, f, z, g = (getattr(self, f"{name}_proj")(x).transpose(0, 1) for name in "ifzg")
        log_decay = _log_forget(f, self.f_bias)
        self.note(log_decay=log_decay)
        c, cell = diagonal_scan(
            None,
            _write(i, self.i_bias, z, self.z_bias),
            None if state is None else state["cell"],
            log_decay=log_decay,
            sequences=sequences,
        )
        y = self.o_proj(_read(c, g, self.g_bias).transpose(0, 1))
        return y + self.o_bias.to(y.dtype), {"cell": cell}

    @override
    def memory(self, state: State) -> Tensor | None:
        return state.get("cell")

    @override
    def init_state(self, batch_size: int) -> State:
        return {"cell": matrix_state(self.parallel, batch_size, self.width)}

    @classmethod
    @override
    def check(cls, config: QuasiLSTMConfig, hidden_size: int) -> None:
        config.width(hidden_size)

    @classmethod
    @override
    def sharded_counts(cls, config: QuasiLSTMConfig, hidden_size: int) -> dict[str, int]:
        return {"hidden_size * expand": config.width(hidden_size)}

    @classmethod
    @override
    def num_parameters(cls, config: QuasiLSTMConfig, hidden_size: int) -> int:
        return config.width(hidden_size) * (5 * hidden_size + 4) + hidden_size

    @classmethod
    @override
    def flops_per_token(cls, config: QuasiLSTMConfig, hidden_size: int, seq_len: int) -> int:
        return 10 * hidden_size * config.width(hidden_size)

    @classmethod
    @override
    def state_bytes(cls, config: QuasiLSTMConfig, hidden_size: int, seq_len: int) -> int:
        return 4 * config.width(hidden_size)


@fused
def _log_forget(f: Tensor, bias: Tensor) -> Tensor:
    """Return ``log sigmoid(f + bias)`` in the bias's dtype."""
    return F.logsigmoid(f.to(bias.dtype) + bias)


@fused
def _write(i: Tensor, i_bias: Tensor, z: Tensor, z_bias: Tensor) -> Tensor:
    """Return ``sigmoid(i + i_bias) tanh(z + z_bias)`` in i's dtype."""
    gate = torch.sigmoid(i.to(i_bias.dtype) + i_bias)
    return (gate * torch.tanh(z.to(z_bias.dtype) + z_bias)).to(i.dtype)


@fused
def _read(c: Tensor, g: Tensor, bias: Tensor) -> Tensor:
    """Return ``sigmoid(g + bias) tanh(c)`` in g's dtype."""
    return (torch.sigmoid(g.to(bias.dtype) + bias) * torch.tanh(c.to(bias.dtype))).to(g.dtype)
