"""HGRN (arXiv 2311.04823): a diagonal recurrence whose forget gates have a lower bound.

    f_t = lb + (1 - lb) sigmoid(W_f x_t);   h_t = f_t h_{t-1} + (1 - f_t) SiLU(W_i x_t)
    y_t = W_o (RMSNorm(h_t) SiLU(W_g x_t))

elementwise over all channels; the norm is over the full width. lb, the least a gate may be, rises
with depth (see :mod:`pretrain.nn.mixers.lower_bounds`). States are real, as in
flash-linear-attention and in studies of hybrids. The paper's own are complex (``complex_state``):
inputs, output gates and norms then have two numbers for each channel, and f_t turns by an angle,

    h_t = f_t e^(i theta) h_{t-1} + (1 - f_t) (SiLU(i_t) + i SiLU(j_t)),

which is learnt by every channel for itself, from 1 in the first one to 1 / 10,000 in the last, as
in the authors' code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import LayerContext, Mixer, MixerCard, MixerConfig, State, register
from pretrain.nn.mixers.lower_bounds import (
    LowerBound,
    add_lower_bound,
    forget_above,
    lower_bound,
    lower_bound_tables,
)
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    matrix_state,
)
from pretrain.nn.mixers.sizes import integral
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, sharded_parameter
from pretrain.ops import diagonal_scan
from pretrain.ops.elementwise.gating import silu_gate


@dataclass(frozen=True)
class HGRNConfig(MixerConfig):
    """Settings of HGRN."""

    head_sizes: ClassVar[tuple[str, ...]] = ()  # there are no heads

    expand: float = setting(1.0, above=0)
    """Channels D of the recurrence as a multiple of the model's width."""
    conv_size: int = setting(0, minimum=0)
    """Taps of a short convolution over the inputs of the recurrence and of its forget gates,
    without an activation; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    complex_state: bool = False
    """Whether states are complex and turn from token to token, by an angle for each channel, as in
    the paper; or real, as in flash-linear-attention."""
    lower_bound: LowerBound = setting("shared")
    """The least a forget gate may be: learnt by all hgrn layers together (``shared``), so that it
    rises from 0 in the first to the last, or by every layer for itself (``own``)."""

    def width(self, hidden_size: int) -> int:
        """Return D. Raises ValueError where it is not whole."""
        return integral(hidden_size * self.expand, "hidden_size * expand")

    @property
    def parts(self) -> int:
        """Return the numbers that a channel's state has."""
        return 2 if self.complex_state else 1


@register("hgrn")
class HGRN(Mixer):
    """HGRN, as a mixer.

    Its state is h ``[N, D]`` in float32, if complex ``[N, D, 2]``, and the convolutions' last
    inputs.
    """

    config_class = HGRNConfig
    over_time = "ops"
    card = MixerCard(
        "HGRN",
        "h_t = f_t h_{t-1} + (1 - f_t) silu(i_t), elementwise;  f_t = lb + (1 - lb) sigmoid(W x_t)",
        "D",
        "scan, chunks side by side",
        "arXiv 2311.04823",
        sharded="D",
    )

    def __init__(self, config: HGRNConfig, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel, width = (
            context.hidden_size,
            context.parallel,
            config.width(context.hidden_size),
        )
        self.width, parts = parallel.local(width, "hidden_size * expand"), config.parts
        self.i_proj = column_linear(parallel, d, parts * width, context.std)
        self.f_proj = column_linear(parallel, d, width, context.std)
        self.g_proj = column_linear(parallel, d, parts * width, context.std)
        self.o_proj = row_linear(parallel, parts * width, d, context.output_std)
        if config.complex_state:
            self.angle = gate_parameter(parallel, (self.width,), _angles)
        widths = {"i": parts * self.width, "f": self.width}
        add_short_convolutions(self, parallel, widths, config.conv_size)
        add_lower_bound(self, context, config.lower_bound, width)
        self.norm = sharded_parameter(parallel, (parts * self.width,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        i, f = (
            convolve(
                self,
                name,
                getattr(self, f"{name}_proj")(x),
                sequences,
                state,
                new_state,
                activation=None,
            )
            for name in "if"
        )
        closing, log_f = forget_above(f, lower_bound(self))
        self.note(log_decay=log_f)
        h = None if state is None else state["recurrent"]
        if self.config.complex_state:
            inputs = silu_gate(closing.repeat_interleave(2, -1), i)
            y, new_state["recurrent"] = self._turning(inputs, log_f, h, sequences)
        else:
            y, new_state["recurrent"] = diagonal_scan(
                None, silu_gate(closing, i), h, log_decay=log_f, sequences=sequences
            )
        y = sharded_rms_norm(y, self.norm, self.config.norm_eps, self.parallel)
        return self.o_proj(silu_gate(y.transpose(0, 1), self.g_proj(x))), new_state

    def _turning(
        self, inputs: Tensor, log_f: Tensor, h: Tensor | None, sequences: Sequences | None
    ) -> tuple[Tensor, Tensor]:
        """Run the complex recurrence; inputs ``[B, T, 2 D]`` are real and imaginary parts in turn.

        Returns states alike, in the inputs' dtype, and the last one ``[N, D, 2]``.
        """
        y, last = diagonal_scan(
            None,
            torch.view_as_complex(inputs.to(log_f.dtype).unflatten(-1, (-1, 2))),
            None if h is None else torch.view_as_complex(h.contiguous()),
            log_decay=torch.complex(log_f, self.angle.expand_as(log_f)),
            sequences=sequences,
        )
        return torch.view_as_real(y).flatten(-2).to(inputs.dtype), torch.view_as_real(last)

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (self.width, 2) if self.config.complex_state else (self.width,)
        return {
            **convolution_states(self, self.parallel, batch_size, "if"),
            "recurrent": matrix_state(self.parallel, batch_size, *shape),
        }

    @classmethod
    @override
    def check(cls, config: HGRNConfig, hidden_size: int) -> None:
        config.width(hidden_size)

    @classmethod
    @override
    def sharded_counts(cls, config: HGRNConfig, hidden_size: int) -> dict[str, int]:
        return {"hidden_size * expand": config.width(hidden_size)}

    @classmethod
    @override
    def num_parameters(cls, config: HGRNConfig, hidden_size: int) -> int:
        parts, own = config.parts, config.lower_bound == "own"
        vectors = parts + config.complex_state + own + (1 + parts) * config.conv_size
        return config.width(hidden_size) * ((1 + 3 * parts) * hidden_size + vectors)

    @classmethod
    @override
    def shared_tables(cls, config: HGRNConfig, hidden_size: int) -> dict[str, int]:
        return lower_bound_tables(config.lower_bound, config.width(hidden_size))

    @classmethod
    @override
    def flops_per_token(cls, config: HGRNConfig, hidden_size: int, seq_len: int) -> int:
        return 2 * (1 + 3 * config.parts) * hidden_size * config.width(hidden_size)

    @classmethod
    @override
    def state_bytes(cls, config: HGRNConfig, hidden_size: int, seq_len: int) -> int:
        convolved = 2 * (1 + config.parts) * max(config.conv_size - 1, 0)
        return (4 * config.parts + convolved) * config.width(hidden_size)


def _angles(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return angles from 1 down, the frequencies of rotary positions."""
    return 10_000.0 ** (-torch.arange(shape[0]) / shape[0])
