"""The base of ParaGRU and ParaLSTM (ParaRNN, arXiv 2510.21450); see :mod:`pretrain.ops.para_rnn`.

x goes through a projection, convolution and SiLU; each head's inputs to its three gates through a
matrix per head (block-diagonal); then the cell; then RMSNorm per head, times SiLU(W_g x), through
W_o. Recurrent weights are diagonal and bounded smoothly, |a| < max_recurrent, which keeps Newton's
method convergent.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, head_shared, row_linear
from pretrain.nn.mixers.base import LayerContext, Mixer, MixerConfig, State, heads
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    matrix_state,
)
from pretrain.nn.mixers.sizes import few_heads
from pretrain.nn.parameters import constant, normal, replicated_parameter, sharded_parameter
from pretrain.ops import NewtonReport
from pretrain.ops.elementwise.rms_norm import rms_norm_silu_gate


@dataclass(frozen=True)
class ParaRNNConfig(MixerConfig):
    """Settings of the networks that Newton's method solves for all steps at once."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: four, or three, two or one where four do not divide the model's width."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a head; null: ``hidden_size / num_heads``."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over the input; 0: there is none."""
    max_recurrent: float | None = setting(0.5, above=0)
    """Bound on the recurrent weights; null: none."""
    iterations: int = setting(10, minimum=1)
    """Most Newton steps before a sequence is computed step by step."""
    tolerance: float | None = setting(None, above=0)
    """Residual at which Newton's method has converged; null: 1e-5, in float64 1e-11."""
    fallback: bool = True
    """Whether a sequence that has not converged is computed step by step. Otherwise it is taken as
    it is, as the published code does after 3 iterations."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = few_heads(hidden_size, self.num_heads, self.head_dim)
        return replace(self, num_heads=num_heads, head_dim=head_dim)


class ParaRNNMixer(Mixer):
    """A cell of ParaRNN, as a mixer.

    Its state is the convolution's last inputs, and the cell's states ``[N, S, H, D]`` in float32.
    """

    config_class = ParaRNNConfig
    over_time = "ops"
    num_states: ClassVar[int]
    recurrent_rows: ClassVar[int]
    memory_gate_bias: ClassVar[float]  # the first gate's bias goes from 0 to this over channels

    def __init__(self, config: ParaRNNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.head_dim = config.head_dim
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width = config.num_heads * self.head_dim
        local = self.num_heads * self.head_dim
        self.x_proj = column_linear(parallel, d, width, context.std)
        self.g_proj = column_linear(parallel, d, width, context.std)
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        add_short_convolutions(self, parallel, {"x": local}, config.conv_size)
        self.gates = sharded_parameter(
            parallel, (self.num_heads, self.head_dim, 3 * self.head_dim), _xavier
        )
        self.bias = gate_parameter(parallel, (self.num_heads, 3, self.head_dim), self._bias_init)
        self.recurrent = gate_parameter(
            parallel,
            (self.num_heads, self.recurrent_rows, self.head_dim),
            # A weight for each channel, whose size follows the base model's width.
            normal(2 / (5 * width / parallel.width) ** 0.5),
        )
        self.norm = replicated_parameter(parallel, (self.head_dim,), constant(1.0))
        self.newton = NewtonReport()

    @classmethod
    def _bias_init(cls, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        bias = torch.zeros(shape)
        channels = torch.linspace(0, cls.memory_gate_bias, shape[0] * shape[2])
        bias[:, 0] = channels.view(shape[0], shape[2])
        return bias

    @abstractmethod
    def cell(
        self, u: Tensor, weights: Tensor, bias: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Run the recurrence of u ``[B, T, 3, D]``.

        The weights are ``[recurrent_rows, D]``, the bias ``[3, D]``. Returns the output and the
        states ``[N, S, D]``.
        """

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        inner = convolve(self, "x", self.x_proj(x), sequences, state, new_state)
        batch_size, length, width = inner.shape
        by_head = inner.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(0, 1)
        u = torch.bmm(by_head, self.gates).unflatten(-1, (3, -1)).permute(1, 2, 0, 3)
        weights = self.recurrent.transpose(0, 1).flatten(1)
        if self.config.max_recurrent is not None:
            # A hard clamp has no gradient outside and would hold every weight that overshoots.
            limit = self.config.max_recurrent
            weights = limit * torch.tanh(weights / limit)
        y, states = self.cell(
            u.reshape(batch_size, length, 3, width),
            weights,
            self.bias.transpose(0, 1).flatten(1),
            sequences=sequences,
            initial_state=None if state is None else state["recurrent"].flatten(2),
            iterations=self.config.iterations,
            tolerance=self.config.tolerance,
            fallback=self.config.fallback,
            report=self.newton,
            watch=self.watch,
        )
        new_state["recurrent"] = states.unflatten(-1, (self.num_heads, -1))
        y = y.to(x.dtype).unflatten(-1, (self.num_heads, -1))
        y = rms_norm_silu_gate(
            y,
            head_shared(self.norm, self.parallel),
            heads(self.g_proj(x), self.num_heads),
            self.config.norm_eps,
        )
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_states, self.num_heads, self.head_dim)
        return {
            **convolution_states(self, self.parallel, batch_size, "x"),
            "recurrent": matrix_state(self.parallel, *shape),
        }

    @override
    def memory(self, state: State) -> Tensor | None:
        return state["recurrent"].flatten(2)  # channels, no matrices

    def metrics(self) -> dict[str, float]:
        """Return Newton's largest residual, most steps, and sequences that fell back to steps."""
        report, self.newton = self.newton, NewtonReport()
        if not report.sequences:
            return {}
        return {
            "newton_residual_max": report.residual,
            "newton_iterations_max": report.iterations,
            "newton_fallbacks": report.fallbacks,
        }

    @classmethod
    @override
    def num_parameters(cls, config: ParaRNNConfig, hidden_size: int) -> int:
        h, dim = config.num_heads, config.head_dim
        width = h * dim
        cell = 3 * h * dim**2 + (3 + cls.recurrent_rows) * width
        return 3 * hidden_size * width + config.conv_size * width + cell + dim

    @classmethod
    @override
    def flops_per_token(cls, config: ParaRNNConfig, hidden_size: int, seq_len: int) -> int:
        h, dim = config.num_heads, config.head_dim
        return 2 * h * (3 * hidden_size * dim + 3 * dim**2)

    @classmethod
    @override
    def state_bytes(cls, config: ParaRNNConfig, hidden_size: int, seq_len: int) -> int:
        width = config.num_heads * config.head_dim
        return (4 * cls.num_states + 2 * max(config.conv_size - 1, 0)) * width


def _xavier(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw each head's and gate's matrix ``[D, D]`` by Xavier's uniform rule."""
    limit = (6 / (2 * shape[1])) ** 0.5
    return (torch.rand(shape, generator=generator) * 2 - 1) * limit
