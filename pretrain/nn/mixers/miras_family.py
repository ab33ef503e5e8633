"""The base of Moneta, Yaad and Memora (Miras, arXiv 2504.13173); see :mod:`pretrain.ops.miras`.

q, k, v = SiLU(conv(W x)), q and k L2-normalised per head; decays, rates and thresholds per channel
through a few channels; the memory is trained on (k, v) and read by q, from values of its own
learned at the start of every document; the output is RMSNorm(o) per head, times SiLU(W_g x),
through W_o.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import (
    ReplicatedLinear,
    column_input,
    column_linear,
    head_shared,
    row_linear,
)
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerConfig,
    State,
    accumulation_dtype,
    heads,
)
from pretrain.nn.mixers.parts import (
    add_short_convolutions,
    convolution_states,
    convolve,
    gate_parameter,
    l2_norm,
    matrix_state,
)
from pretrain.nn.mixers.sizes import heads_for, per_head, split_width
from pretrain.nn.parameters import (
    Initializer,
    constant,
    normal,
    replicated_parameter,
    sharded_parameter,
)
from pretrain.ops import MirasRule, MirasState, miras
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.rms_norm import rms_norm_silu_gate


@dataclass(frozen=True)
class MirasConfig(MixerConfig):
    """Settings that Moneta, Yaad and Memora share."""

    head_sizes = ("head_dim", "gate_rank")
    # Of the highest rate of a linear memory, where none is given.
    mlp_rate: ClassVar[float] = 1 / 4

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a head has 128 channels, a quarter of a
    smaller width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Channels of a key and of a value; null: ``hidden_size / num_heads``."""
    memory: Literal["mlp", "linear"] = setting("mlp")
    """What a head learns while it reads: ``mlp``, two matrices with GELU between, a norm and a
    residual, or ``linear``, one matrix."""
    expansion: int = setting(4, minimum=1)
    """Hidden channels of an ``mlp`` memory as a multiple of its input."""
    chunk_size: int = setting(16, minimum=1)
    """Tokens whose gradients are taken at the same memory, that before the first of them, which is
    part of the model; 1: each at the memory that the token before left."""
    max_rate: float | None = setting(None, above=0)
    """What the memory's learning rates stay below; null: ``1 / chunk_size``, with which gradients
    of squared errors do not overshoot even in a chunk whose keys are all the same, and for an
    ``mlp`` memory, whose loss is steeper, a quarter of it, Moneta a 32nd. Several times as much
    lets gradients through long sequences grow without bound."""
    gate_rank: Derived = setting(None, minimum=1)
    """Channels between the two matrices of decays, of rates and of thresholds; null: 32, or an
    eighth of a width below 256."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries, keys and values; 0: there is none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Return the shapes of a head's matrices."""
        dim, hidden = self.head_dim, self.head_dim * self.expansion
        return [(dim, dim)] if self.memory == "linear" else [(dim, hidden), (hidden, dim)]

    @property
    def highest_rate(self) -> float:
        """Return what learning rates stay below."""
        if self.max_rate is not None:
            return self.max_rate
        return (1.0 if self.memory == "linear" else self.mlp_rate) / self.chunk_size

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 128)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        return replace(
            self,
            num_heads=num_heads,
            head_dim=head_dim or per_head(hidden_size, num_heads),
            gate_rank=self.gate_rank or min(32, max(hidden_size // 8, 1)),
        )


class MirasMixer(Mixer):
    """A memory trained online, as a mixer.

    Its state is the convolutions' last inputs, and for each matrix of the memory its difference,
    in float32, from the one that documents begin with: ``start``, at the open chunk's first token,
    and ``now``; and the tokens so far, which say how many are in that chunk. A subclass says by
    :meth:`rule` what the memory is trained by.
    """

    speed_settings = ()
    gates: ClassVar[str] = "ar"  # decays, rates, and t where there are thresholds

    def __init__(self, config: Any, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        width, local = config.num_heads * config.head_dim, self.num_heads * config.head_dim
        for name in "qkvg":
            setattr(self, f"{name}_proj", column_linear(parallel, d, width, context.std))
        starts: dict[str, Initializer] = {
            "a": _slow_decay if config.memory == "mlp" else _decay,
            "r": constant(_rate_bias(config.highest_rate)),
            "t": constant(math.log(math.e - 1)),  # thresholds of 1
        }
        rank = config.gate_rank
        for name in self.gates:
            setattr(self, f"{name}_down", ReplicatedLinear(parallel, d, rank, context.std))
            up = column_linear(parallel, rank, width, context.std, role="input", precise=True)
            setattr(self, f"{name}_up", up)
            setattr(self, f"{name}_bias", gate_parameter(parallel, (local,), starts[name]))
        self.o_proj = row_linear(parallel, width, d, context.output_std)
        add_short_convolutions(self, parallel, dict.fromkeys("qkv", local), config.conv_size)
        self.norm = replicated_parameter(parallel, (config.head_dim,), constant(1.0))
        rule = self.rule(config)
        for number, shape in enumerate(config.shapes):
            # Keys have norm 1, and the norm in an MLP divides by what its matrices' size is: of
            # this size they are learned at rates of the order of a linear memory's.
            wide = config.memory == "mlp" or rule.retention == "softmax"
            std = 1.0 if wide else shape[0] ** -0.5
            matrix = sharded_parameter(
                parallel,
                (self.num_heads, *shape),
                normal(std),
                dtype=accumulation_dtype(parallel.dtype),
                decay=False,
            )
            self.register_parameter(f"memory_{number}", matrix)

    @classmethod
    @abstractmethod
    def rule(cls, config: Any) -> MirasRule:
        """Return what the memory is trained by."""

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        new_state: State = {}
        q, k, v = (
            convolve(
                self, name, getattr(self, f"{name}_proj")(x), sequences, state, new_state
            ).unflatten(-1, (self.num_heads, -1))
            for name in "qkv"
        )
        log_decay = _log_decay(*self._gate("a", x))
        rate = _rate(*self._gate("r", x), self.config.highest_rate)
        self.note(log_decay=log_decay, rate=rate)
        names = [f"memory_{number}" for number in range(len(self.config.shapes))]
        y, new = miras(
            l2_norm(q),
            l2_norm(k),
            v,
            heads(log_decay, self.num_heads),
            heads(rate, self.num_heads),
            [self.get_parameter(name) for name in names],
            rule=self.rule(self.config),
            threshold=heads(_threshold(*self._gate("t", x)), self.num_heads)
            if "t" in self.gates
            else None,
            chunk_size=self.config.chunk_size,
            sequences=sequences,
            initial_state=None
            if state is None
            else MirasState(
                tuple(state[f"{name}_start"] for name in names),
                tuple(state[f"{name}_now"] for name in names),
                state["seen"],
            ),
        )
        for name, start, now in zip(names, new.start, new.now, strict=True):
            new_state[f"{name}_start"], new_state[f"{name}_now"] = start, now
        new_state["seen"] = new.seen
        norm, eps = head_shared(self.norm, self.parallel), self.config.norm_eps
        y = rms_norm_silu_gate(y, norm, heads(self.get_submodule("g_proj")(x), self.num_heads), eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    def _gate(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return a gate ``[T, B, H * D]`` before its bias and nonlinearity, and the bias."""
        down, up = self.get_submodule(f"{name}_down"), self.get_submodule(f"{name}_up")
        return up(down(x)), self.get_parameter(f"{name}_bias")

    @override
    def memory(self, state: State) -> Tensor | None:
        return state.get("memory_0_now")

    @override
    def init_state(self, batch_size: int) -> State:
        state = convolution_states(self, self.parallel, batch_size, "qkv")
        for number, shape in enumerate(self.config.shapes):
            for name in ("start", "now"):
                zeros = matrix_state(self.parallel, batch_size, self.num_heads, *shape)
                state[f"memory_{number}_{name}"] = zeros
        seen = torch.zeros(batch_size, dtype=torch.int64, device=self.parallel.device)
        return {**state, "seen": seen}

    @classmethod
    @override
    def check(cls, config: Any, hidden_size: int) -> None:
        pass

    @classmethod
    def _matrices(cls, config: Any, hidden_size: int) -> int:
        """Return the elements of the projections and of the gates' matrices."""
        width = config.num_heads * config.head_dim
        return 5 * hidden_size * width + len(cls.gates) * config.gate_rank * (hidden_size + width)

    @classmethod
    @override
    def num_parameters(cls, config: Any, hidden_size: int) -> int:
        width = config.num_heads * config.head_dim
        memory = config.num_heads * sum(a * b for a, b in config.shapes)
        vectors = width * (3 * config.conv_size + len(cls.gates)) + config.head_dim
        return cls._matrices(config, hidden_size) + memory + vectors

    @classmethod
    @override
    def flops_per_token(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        chunk, rule = config.chunk_size, cls.rule(config)
        products = 1 if config.memory == "linear" else 3  # for a gradient
        count, size = len(config.shapes), config.shapes[0][0] * config.shapes[0][1]
        if rule.elementwise:  # A after each token, and a read of it
            memory = 2 * size * (products + count * (chunk + 1))
        else:  # a read of the start and a step of it; pairs of the chunk
            pairs = config.head_dim + config.shapes[0][1]
            memory = 2 * size * (products + 2 * count) + 2 * count * chunk * pairs
        return 2 * cls._matrices(config, hidden_size) + config.num_heads * memory

    @classmethod
    @override
    def state_bytes(cls, config: Any, hidden_size: int, seq_len: int) -> int:
        memory = sum(a * b for a, b in config.shapes)
        inputs = 3 * max(config.conv_size - 1, 0) * config.head_dim
        return config.num_heads * (8 * memory + 2 * inputs)


def _decay(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return biases from 3 to 6 over channels: memories of some ten to some hundred tokens."""
    return torch.linspace(3.0, 6.0, shape[0])


def _slow_decay(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Return biases from 6 to 9: memories of some hundred to some thousand tokens.

    A norm undoes what an MLP forgets, but the smaller its matrices the larger is what a gradient
    changes, until it learns nothing stable.
    """
    return torch.linspace(6.0, 9.0, shape[0])


def _rate_bias(highest: float) -> float:
    """Return the bias with which rates start at 0.05, or half of the highest if that is less."""
    share = min(0.05 / highest, 0.5)
    return math.log(share / (1 - share))


@fused
def _log_decay(x: Tensor, bias: Tensor) -> Tensor:
    return F.logsigmoid(x.to(bias.dtype) + bias)


@fused
def _rate(x: Tensor, bias: Tensor, highest: float) -> Tensor:
    return highest * torch.sigmoid(x.to(bias.dtype) + bias)


@fused
def _threshold(x: Tensor, bias: Tensor) -> Tensor:
    return F.softplus(x.to(bias.dtype) + bias)
