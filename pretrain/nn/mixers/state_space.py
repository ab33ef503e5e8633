"""The base of S4D and S4: a time-invariant system for each channel; see :mod:`pretrain.ops.lti`.

    x' = A x + B u;   y = 2 Re C x + D u        over N / 2 modes, sampled every Delta
    gated: W_o (y * SiLU(W_g x)) with u = W_u x;        glu: GLU(W_o GELU(y)) with u = x

``gated`` is the block of this project's other layers, ``glu`` that of the papers. A, B and Delta
have no weight decay, and a limit on their learning rate where ``max_dynamics_lr`` sets one.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerConfig,
    State,
    accumulation_dtype,
    states_wanted,
)
from pretrain.nn.mixers.parts import gate_parameter, matrix_state
from pretrain.nn.mixers.sizes import power_of_two_width
from pretrain.nn.parameters import change_info, normal, sharded_parameter
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import skip_silu_gate

LEAST_DECAY = 1e-4
"""The least -Re A, which would otherwise let a state grow."""


@dataclass(frozen=True)
class StateSpaceConfig(MixerConfig):
    """Settings that S4D and S4 share."""

    head_sizes: ClassVar[tuple[str, ...]] = ("state_size",)
    head_counts: ClassVar[tuple[str, ...]] = ()

    state_size: Derived = setting(None, minimum=2)
    """States N of a channel, an even number: pairs of conjugates; null: the largest power of two
    that is at most 64 and a quarter of the model's width, 2 at least."""
    output: Literal["gated", "glu"] = setting("gated")
    """What is made of a channel's output: ``gated`` multiplies it by the SiLU of a projection, with
    a projection before it and one after it; ``glu`` is the papers' GELU, projection to twice the
    width and GLU, with no projection before it."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""
    max_dynamics_lr: float | None = setting(None, above=0)
    """The highest peak that A, B and Delta have where ``optimizer.lr`` is higher, 0.001 in the
    papers; null: they learn as fast as all else."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        size = self.state_size or max(power_of_two_width(hidden_size, 64), 2)
        return replace(self, state_size=size)


class StateSpaceMixer(Mixer):
    """A time-invariant system for each channel, as a mixer.

    Its state is x ``[N, d, state_size]`` in float32: each mode's real part, then its imaginary one.
    """

    matrices: ClassVar[int]  # numbers for each state of a channel: A, B, C, ...
    A_log: nn.Parameter
    A_imag: nn.Parameter

    def __init__(self, config: Any, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.channels = parallel.local(d, "hidden_size")
        if config.output == "gated":
            self.u_proj = column_linear(parallel, d, d, context.std)
            self.g_proj = column_linear(parallel, d, d, context.std)
            self.o_proj = row_linear(parallel, d, d, context.output_std)
        else:
            self.o_proj = row_linear(parallel, d, 2 * d, context.output_std)
        shape = (self.channels, config.state_size // 2)
        for name, init in self.spectrum().items():
            self.register_parameter(name, self.dynamics(shape, init))
        self.B = self.dynamics((*shape, 2), self.input_init())
        dtype = accumulation_dtype(parallel.dtype)
        self.C = sharded_parameter(parallel, (*shape, 2), normal(0.5**0.5), dtype=dtype)
        self.dt_log = self.dynamics(shape[:1], _step_init)
        self.D = gate_parameter(parallel, shape[:1], normal(1.0))

    def dynamics(self, shape: tuple[int, ...], init: Any) -> nn.Parameter:
        """Make a parameter of A, B or Delta, of the local ``shape``."""
        parameter = gate_parameter(self.parallel, shape, init)
        return change_info(parameter, max_lr=self.config.max_dynamics_lr)

    @abstractmethod
    def spectrum(self) -> dict[str, Any]:
        """Return the initializers of A_log, which is log(-Re A), and A_imag ``[d, N / 2]``."""

    @abstractmethod
    def input_init(self) -> Any:
        """Return the initializer of B ``[d, N / 2, 2]``."""

    @abstractmethod
    def run(
        self, u: Tensor, sequences: Sequences | None, state: Tensor | None, *, final_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Run the system over u ``[B, T, channels]``, without D."""

    def decay(self) -> Tensor:
        """Return Re A ``[channels, N / 2]``."""
        return -self.A_log.exp().clamp_min(LEAST_DECAY)

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        gated = self.config.output == "gated"
        first = self.parallel.tensor_rank * self.channels
        u = self.u_proj(x) if gated else x.narrow(-1, first, self.channels)
        u = u.transpose(0, 1)
        before = None if state is None else state["recurrent"]
        wanted = states_wanted() or self.watcher is not None
        y, last = self.run(u, sequences, before, final_state=wanted)
        if gated:
            y = skip_silu_gate(y, u, self.D, self.g_proj(x).transpose(0, 1))
            result = self.o_proj(y.transpose(0, 1))
        else:
            result = F.glu(self.o_proj(_skip_gelu(y, u, self.D).transpose(0, 1)), -1)
        return result, {} if last is None else {"recurrent": last}

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.channels, self.config.state_size)
        return {"recurrent": matrix_state(self.parallel, *shape)}

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        if config.state_size % 2:
            raise ValueError(f"state_size is {config.state_size}, expected an even number")

    @classmethod
    @override
    def sharded_counts(cls, config: Any, hidden_size: int) -> dict[str, int]:
        return {"hidden_size": hidden_size}

    @classmethod
    @override
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        matrices = 3 if config.output == "gated" else 2
        return hidden_size * (matrices * hidden_size + cls.matrices * config.state_size + 2)

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        matrices = 3 if config.output == "gated" else 2
        mixing = 2 * config.chunk_size + 4 * config.state_size
        return hidden_size * (2 * matrices * hidden_size + mixing)

    @classmethod
    @override
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        return 4 * hidden_size * config.state_size


def pairs(x: Tensor) -> Tensor:
    """Return complex numbers of their parts ``[..., 2]``, which lie anywhere in memory."""
    return torch.complex(x[..., 0], x[..., 1])


@fused
def _skip_gelu(y: Tensor, u: Tensor, weight: Tensor) -> Tensor:
    """Return ``GELU(y + weight u)`` in y's dtype."""
    return F.gelu((y + weight * u).to(y.dtype))


def _step_init(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw log Delta uniformly between those of 1e-3 and 1e-1."""
    low, high = math.log(1e-3), math.log(1e-1)
    return torch.rand(shape, generator=generator) * (high - low) + low


def legs_modes(size: int) -> tuple[Tensor, Tensor]:
    """Return Im A and B ``[size / 2]`` of HiPPO-LegS's normal part, in float64; Re A is -1/2.

    LegS is A = N - P P^T with B = sqrt(2) P and N = -1/2 + a skew matrix, whose eigenvectors give
    the modes. Their phases, which only turn C, are chosen such that B is positive.
    """
    root = torch.sqrt(2 * torch.arange(size, dtype=torch.float64) + 1)
    below = torch.outer(root, root).tril(-1) / 2  # N's skew part is its transpose minus it
    values, vectors = torch.linalg.eigh(1j * (below - below.T))
    inputs = vectors.mH @ root.to(vectors.dtype)
    return values[size // 2 :].clone(), inputs[size // 2 :].abs()


@dataclass(frozen=True)
class LegSFrequencies:
    """The frequencies of LegS's modes; a class, so that models can be pickled."""

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        return legs_modes(2 * shape[1])[0].float().expand(shape)


@dataclass(frozen=True)
class LegSInputs:
    """LegS's B, times ``scale``, as pairs of a real and an imaginary part."""

    scale: float = 1.0

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """Return float32 values of ``shape``."""
        real = (self.scale * legs_modes(2 * shape[1])[1]).float()
        return torch.stack([real, torch.zeros_like(real)], -1).expand(shape)
