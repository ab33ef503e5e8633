"""Mamba-3 with a single input (state-spaces/mamba): rotating states, and a trapezoidal step.

    D_t = softplus(W_dt x + dt_bias);  a_t = exp(A_t D_t);  A_t = -max(softplus(W_A x), 1e-4)
    S_t = a_t S_{t-1} + (1 - l_t) D_t a_t B_{t-1}^T x_{t-1} + l_t D_t B_t^T x_t
    y_t = C_t S_t + D x_t;             out = W_o (y * SiLU(z));            l_t = sigmoid(W_l x)

B and C are RMS-normalised and get a bias for each head; then their first channels are rotated in
pairs by angles that add up over time, pi tanh(W_r x) D_t a token. There is no convolution. The
public module's other variants, several inputs and a norm of the output, are not here.

This is one linear attention: what token t adds at t + 1 is part of what it adds at t, so that its
key is B_t (l_t D_t + n_t) with n_t = (1 - l_{t+1}) D_{t+1}; only its own output must not have n_t.
The last token's is not known yet, so a state has B and x of that token, too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, group_linear, head_shared, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
    states_wanted,
)
from pretrain.nn.mixers.parts import (
    borders,
    gate_parameter,
    linear_attention_flops,
    matrix_state,
    repeat_heads,
    time_step_init,
)
from pretrain.nn.mixers.sizes import integral, power_of_two_width, split_width
from pretrain.nn.parameters import constant, replicated_parameter
from pretrain.ops import linear_attention
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.elementwise.gating import skip_silu_gate
from pretrain.ops.elementwise.rms_norm import rms_norm
from pretrain.ops.shared.chunking import from_chunks, to_chunks

LEAST_DECAY = 1e-4
"""The least -A."""
ANGLES_AT_ONCE = 64
"""Tokens over which angles are summed before they are reduced."""


@dataclass(frozen=True)
class Mamba3Config(MixerConfig):
    """Settings of Mamba-3, which has ``hidden_size * expand / head_dim`` heads."""

    head_sizes: ClassVar[tuple[str, ...]] = ("head_dim", "state_size")
    head_counts: ClassVar[tuple[str, ...]] = ()

    expand: float = setting(2.0, above=0)
    """Inner width as a multiple of the model's."""
    head_dim: Derived = setting(None, minimum=1)
    """Width P of a head of x; null: 64, a quarter of a smaller inner width, or what divides the
    inner width near that."""
    state_size: Derived = setting(None, minimum=1)
    """Width N of B and C; null: the largest power of two that is at most 128 and a quarter of the
    model's width, 4 at least."""
    num_groups: int = setting(1, minimum=1)
    """Groups of heads that share B and C, a divisor of the number of heads."""
    rope_fraction: float = setting(0.5, minimum=0, maximum=1)
    """Share of the channels of B and C that are rotated; 0: none."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norms of B and C."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        inner = integral(hidden_size * self.expand, "hidden_size * expand")
        return replace(
            self,
            head_dim=self.head_dim or split_width(inner, 64, multiple_of=self.num_groups)[1],
            state_size=self.state_size or max(power_of_two_width(hidden_size, 128), 4),
        )

    def num_heads(self, hidden_size: int) -> int:
        """Return the number of heads. Raises ValueError where it is not whole."""
        inner = integral(hidden_size * self.expand, "hidden_size * expand")
        return integral(inner / self.head_dim, "hidden_size * expand / head_dim")

    @property
    def num_angles(self) -> int:
        """Return the number R of rotated pairs. Raises ValueError where it is not whole."""
        return integral(self.state_size * self.rope_fraction / 2, "state_size * rope_fraction / 2")


@register("mamba3")
class Mamba3(Mixer):
    """Mamba-3, as a mixer.

    Its state is S ``[N, H, state_size, head_dim]`` without what the last token adds later, that
    token's rotated B ``[N, H, state_size]`` and x ``[N, H, head_dim]``, and the angles
    ``[N, H, R]`` from -pi to pi, in float64.
    """

    b_bias: nn.Parameter
    c_bias: nn.Parameter

    config_class = Mamba3Config
    exact_states = ("angle",)
    card = MixerCard(
        "Mamba-3",
        "S_t = a_t S_{t-1} + (1 - l_t) D_t a_t B_{t-1}^T x_{t-1} + l_t D_t B_t^T x_t;  "
        "y_t = C_t S_t + D x_t, B and C rotated",
        "H (N P + N + P + R)",
        "chunks (SSD)",
        "github.com/state-spaces/mamba",
    )

    def __init__(self, config: Mamba3Config, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        num_heads, size = config.num_heads(d), config.state_size
        self.num_heads = parallel.local(num_heads, "num_heads")
        inner = num_heads * config.head_dim
        self.z_proj = column_linear(parallel, d, inner, context.std)
        self.x_proj = column_linear(parallel, d, inner, context.std)
        for name in "bc":
            projection = group_linear(
                parallel, d, config.num_groups, size, context.std, "num_groups"
            )
            setattr(self, f"{name}_proj", projection)
            norm = replicated_parameter(parallel, (size,), constant(1.0))
            self.register_parameter(f"{name}_norm", norm)
            bias = gate_parameter(parallel, (self.num_heads, size), constant(1.0))
            self.register_parameter(f"{name}_bias", bias)
        self.groups = max(config.num_groups // parallel.tensor_size, 1)
        for name in ("dt", "a", "trapezoid"):
            projection = column_linear(parallel, d, num_heads, context.std, precise=True)
            setattr(self, f"{name}_proj", projection)
        self.num_angles = config.num_angles
        if self.num_angles:
            self.angle_proj = group_linear(
                parallel, d, 1, self.num_angles, context.std, "the number of angles' groups"
            )
        self.o_proj = row_linear(parallel, inner, d, context.output_std)
        self.dt_bias = gate_parameter(parallel, (self.num_heads,), time_step_init)
        self.D = gate_parameter(parallel, (self.num_heads,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        rows = sequences or Sequences.of_rows(x.shape[1], x.shape[0], x.device)
        before = self.init_state(rows.count) if state is None else state
        dt, a, trapezoid = (
            getattr(self, f"{name}_proj")(x).transpose(0, 1) for name in ("dt", "a", "trapezoid")
        )
        step, log_decay, now, later = _gates(dt, a, trapezoid, self.dt_bias)
        self.note(log_decay=log_decay, step=step)
        angles = None
        last_angles = before["angle"]
        if self.num_angles:
            turn = _turns(self.angle_proj(x).transpose(0, 1), step)
            angles, last_angles = running_angles(turn.flatten(0, 1), rows, before["angle"])
            angles = angles.view(turn.shape)
        b, c = (self._read_key(name, x) for name in "bc")
        inner = heads(self.x_proj(x), self.num_heads)
        owners, first, last = rows.derive(borders)
        # What each token adds when the next one comes: 0 where none does.
        carried = later.flatten(0, 1)
        after = torch.cat([carried[1:], torch.zeros_like(carried[:1])]).index_fill(0, last, 0.0)
        after = after.view(later.shape)
        key, query, own = _keys(b, c, self.b_bias, self.c_bias, angles, now, after)
        weight = carried.new_zeros(rows.count, self.num_heads)
        weight = weight.index_copy(0, owners, carried[first])
        started = before["recurrent"] + (
            (weight[..., None] * before["key"])[..., None] * before["value"][..., None, :]
        )
        y, recurrent = linear_attention(
            query,
            key,
            inner,
            log_decay=log_decay,
            scale=1.0,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=started,
        )
        skip = (self.D - own)[..., None]
        y = skip_silu_gate(y, inner, skip, heads(self.z_proj(x), self.num_heads))
        output = self.o_proj(y.flatten(2).transpose(0, 1))
        if not states_wanted():
            return output, {"recurrent": recurrent}
        ending = b.flatten(0, 1)[last].to(self.b_bias.dtype) + self.b_bias
        if angles is not None:
            ending = _rotated(ending, angles.flatten(0, 1)[last])
        return output, {
            "recurrent": recurrent,
            "key": before["key"].index_copy(0, owners, ending),
            "value": before["value"].index_copy(0, owners, inner.flatten(0, 1)[last]),
            "angle": last_angles,
        }

    def _read_key(self, name: str, x: Tensor) -> Tensor:
        """Return B or C, normalised, for each head ``[B, T, H, N]``."""
        found = getattr(self, f"{name}_proj")(x).transpose(0, 1)
        norm = head_shared(getattr(self, f"{name}_norm"), self.parallel)
        found = rms_norm(found.unflatten(-1, (self.groups, -1)), norm, self.config.norm_eps)
        return repeat_heads(found, self.num_heads // self.groups)

    @override
    def init_state(self, batch_size: int) -> State:
        parallel, rows = self.parallel, (batch_size, self.num_heads)
        size, width = self.config.state_size, self.config.head_dim
        value = torch.zeros(*rows, width, dtype=parallel.dtype, device=parallel.device)
        return {
            "recurrent": matrix_state(parallel, *rows, size, width),
            "key": matrix_state(parallel, *rows, size),
            "value": value,
            "angle": torch.zeros(
                *rows, self.num_angles, dtype=torch.float64, device=parallel.device
            ),
        }

    @classmethod
    @override
    def check(cls, config: Mamba3Config, hidden_size: int) -> None:
        num_heads = config.num_heads(hidden_size)
        if num_heads % config.num_groups:
            raise ValueError(
                f"num_groups is {config.num_groups}, which does not divide the {num_heads} heads"
            )
        _ = config.num_angles

    @classmethod
    @override
    def sharded_counts(cls, config: Mamba3Config, hidden_size: int) -> dict[str, int]:
        return {
            "hidden_size * expand / head_dim": config.num_heads(hidden_size),
            "num_groups": config.num_groups,
        }

    @classmethod
    def _widths(cls, config: Mamba3Config, hidden_size: int) -> int:
        """Return the sum of the widths of all projections."""
        num_heads = config.num_heads(hidden_size)
        shared = 2 * config.num_groups * config.state_size + config.num_angles
        return num_heads * (3 * config.head_dim + 3) + shared

    @classmethod
    @override
    def num_parameters(cls, config: Mamba3Config, hidden_size: int) -> int:
        num_heads, size = config.num_heads(hidden_size), config.state_size
        matrices = hidden_size * cls._widths(config, hidden_size)
        return matrices + 2 * (num_heads + 1) * size + 2 * num_heads

    @classmethod
    @override
    def flops_per_token(cls, config: Mamba3Config, hidden_size: int, seq_len: int) -> int:
        mixing = linear_attention_flops(config.state_size, config.head_dim, config.chunk_size)
        matrices = 2 * hidden_size * cls._widths(config, hidden_size)
        return matrices + config.num_heads(hidden_size) * mixing

    @classmethod
    @override
    def state_bytes(cls, config: Mamba3Config, hidden_size: int, seq_len: int) -> int:
        size, width = config.state_size, config.head_dim
        wide = 4 * (size * width + size) + 8 * config.num_angles
        return config.num_heads(hidden_size) * (wide + 2 * width)


@fused
def _gates(
    step: Tensor, rate: Tensor, trapezoid: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return D_t, the log-decay A_t D_t, l_t D_t and (1 - l_t) D_t ``[B, T, H]``."""
    step = F.softplus(step.to(bias.dtype) + bias)
    rate = F.softplus(rate.to(bias.dtype)).clamp_min(LEAST_DECAY)
    trapezoid = trapezoid.to(bias.dtype)
    return step, -rate * step, torch.sigmoid(trapezoid) * step, torch.sigmoid(-trapezoid) * step


@fused
def _turns(angle: Tensor, step: Tensor) -> Tensor:
    """Return by how much each head's pairs turn ``[B, T, H, R]``, of all heads' ``[B, T, R]``."""
    return math.pi * torch.tanh(angle.to(step.dtype))[:, :, None] * step[..., None]


def _reduced(angle: Tensor) -> Tensor:
    """Return an angle from -pi to pi, with the gradient of the one given."""
    return angle - 2 * math.pi * torch.round(angle.detach() / (2 * math.pi))


def running_angles(turns: Tensor, sequences: Sequences, before: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of turns ``[T, H, R]`` since ``before`` ``[N, H, R]``, and the last ones.

    They are sums over chunks since their starts, which are in float64: a sum over thousands of
    turns has no exact fraction of a turn in float32.
    """
    size = min(ANGLES_AT_ONCE, max(sequences.max_length, 1))
    layout = sequences.chunk_layout(size)
    chunks = to_chunks(_reduced(turns), layout, head_axis=2)  # [n, H, C, R], 0 at padding
    starts, ended, angle = [], [], before.double()[layout.order]
    over_chunk = chunks.sum(2, dtype=torch.float64)
    for part in over_chunk.split([count for _, count in layout.steps]):
        if len(part) < len(angle):
            ended.append(angle[len(part) :])
            angle = angle[: len(part)]
        starts.append(angle)
        angle = _reduced(angle + part)
    angles = chunks.cumsum(2)
    if starts:
        angles = _reduced(angles + torch.cat(starts)[:, :, None].to(angles.dtype))
    last = torch.cat([angle, *reversed(ended)])[torch.argsort(layout.order)]
    return from_chunks(angles, layout), last


@fused
def _keys(
    b: Tensor,
    c: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    angles: Tensor | None,
    now: Tensor,
    after: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``B (now + after)`` and C, biased and rotated, and ``(C B) after`` ``[B, T, H]``."""
    dtype = c.dtype
    b, c = b.to(b_bias.dtype) + b_bias, c.to(c_bias.dtype) + c_bias
    own = (b * c).sum(-1) * after  # turned alike, so not at all
    if angles is not None:
        b, c = _rotated(b, angles), _rotated(c, angles)
    return b * (now + after)[..., None], c.to(dtype), own


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate the first channels of x in adjacent pairs, by angles ``[..., R]``."""
    turned, cos, sin = 2 * angles.shape[-1], angles.cos(), angles.sin()
    first, second = x[..., :turned].unflatten(-1, (-1, 2)).unbind(-1)
    pairs = torch.stack([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([pairs.flatten(-2), x[..., turned:]], -1)
