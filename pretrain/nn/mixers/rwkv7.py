"""RWKV-7, "Goose" (arXiv 2503.14456): its time mixing, the sequence layer.

Each of six inputs mixes a token's x with that of the token before, x_c = x + mu_c (x' - x):

    r, k0, v = W_r x_r, W_k x_k, W_v x_v;         a = sigmoid(a_0 + B_a A_a x_a)
    log decay = -e^(-1/2) sigmoid(w_0 + B_w tanh(A_w x_w));     gate = B_g sigmoid(A_g x_g)
    e = k0 xi, normalised per head;               k = k0 (1 + (a - 1) alpha)
    S_t = Diag(decay) S_{t-1} - (e a)^T (e S_{t-1}) + k^T v;    o = r S_t
    y = W_o ((norm(o) + (sum over channels of r k rho) v) gate), the norm per head

Later layers of a model mix the first one's values into theirs, v + (v_first - v) sigmoid(v_0 + B_v
A_v x_v). Parameters start as published. What follows the layer is the model's own MLP, which is
RWKV's channel mixing with ``model.mlp.kind: rwkv``.
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
    MixerCard,
    MixerConfig,
    State,
    accumulation_dtype,
    heads,
    register,
)
from pretrain.nn.mixers.parts import dplr_flops, gate_parameter, matrix_state, power_of_two
from pretrain.nn.mixers.rwkv7_start import MIX_EXPONENTS, ByChannel, Mix, start_orthogonal
from pretrain.nn.mixers.sizes import heads_for, per_head, split_width
from pretrain.nn.mixers.token_shift import mixed, no_token_before, token_before
from pretrain.nn.parameters import (
    Initializer,
    constant,
    replicated_parameter,
    sharded_parameter,
)
from pretrain.ops import dplr
from pretrain.ops.elementwise.fusing import fused

_LEAST_LOG_DECAY = -math.exp(-0.5)


@dataclass(frozen=True)
class RWKV7Config(MixerConfig):
    """Settings of RWKV-7."""

    head_sizes: ClassVar[tuple[str, ...]] = (
        "head_dim",
        "decay_rank",
        "rate_rank",
        "value_rank",
        "gate_rank",
    )

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``, where a head has 64 channels, a quarter of a smaller
    width, or what divides the width near that."""
    head_dim: Derived = setting(None, minimum=1)
    """Width of a key and of a value; null: ``hidden_size / num_heads``."""
    decay_rank: Derived = setting(None, minimum=1)
    """Width between the two matrices of the decay; null: 2.5 times the root of the model's width,
    in proportion to heads of 64 channels, rounded to 32 and at least 32."""
    rate_rank: Derived = setting(None, minimum=1)
    """The same for a, the rate at which the state learns; null: as ``decay_rank``."""
    value_rank: Derived = setting(None, minimum=1)
    """The same for the share of the first layer's values; null: 1.7 times the root of the model's
    width, in proportion to heads of 64 channels, rounded to 32 and at least 32."""
    gate_rank: Derived = setting(None, minimum=1)
    """The same for the output gate; null: 5 times the root of the model's width, rounded to 32."""
    value_residual: bool = True
    """Whether later layers of a model mix the values of the first one into their own."""
    zero_output: bool = True
    """Whether the output projection starts at 0, as published, or as that of other layers."""
    norm_eps: float = setting(1e-5, above=0)
    """Times ``head_dim``, what is added to the variance in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @property
    def width(self) -> int:
        """Return the channels of all heads together."""
        return int(self.num_heads * self.head_dim)

    @property
    def ranks(self) -> dict[str, int]:
        """Return the widths of every layer's low-rank maps, by the name of what they give."""
        return {"w": self.decay_rank, "a": self.rate_rank, "g": self.gate_rank}

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 64)
        num_heads = num_heads or heads_for(hidden_size, head_dim)
        head_dim = head_dim or per_head(hidden_size, num_heads)

        def rank(times: float) -> int:
            return max(32, round(times * hidden_size**0.5 / 32) * 32)

        small = rank(2.5 * head_dim / 64)
        return replace(
            self,
            num_heads=num_heads,
            head_dim=head_dim,
            decay_rank=self.decay_rank or small,
            rate_rank=self.rate_rank or small,
            value_rank=self.value_rank or rank(1.7 * head_dim / 64),
            gate_rank=self.gate_rank or rank(5),
        )


@register("rwkv7")
class RWKV7(Mixer):
    """RWKV-7's time mixing, as a mixer.

    Its state is the last input ``[N, 1, d]`` and S ``[N, H, K, V]`` in float32.
    """

    value_bias: nn.Parameter

    config_class = RWKV7Config
    over_time = "ops"
    card = MixerCard(
        "RWKV-7",
        "S_t = (Diag(w_t) - (e_t a_t)^T e_t) S_{t-1} + k_t^T v_t;  o_t = r_t S_t",
        "d + H K V",
        "chunks, UT transform, pairs by halving",
        "arXiv 2503.14456",
    )

    def __init__(self, config: RWKV7Config, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, width, parallel = context.hidden_size, config.width, context.parallel
        self.hidden_size = d
        self.num_heads = parallel.local(config.num_heads, "num_heads")
        self.r_proj = start_orthogonal(column_linear(parallel, d, width, 1.0), parallel, 1.0)
        self.k_proj = start_orthogonal(column_linear(parallel, d, width, 1.0), parallel, 0.1)
        self.v_proj = start_orthogonal(column_linear(parallel, d, width, 1.0), parallel, 1.0)
        self.later = config.value_residual and context.number > 0
        self.down, self.up = nn.ModuleDict(), nn.ModuleDict()
        ranks = config.ranks | ({"v": config.value_rank} if self.later else {})
        for name, rank in ranks.items():
            self.down[name] = ReplicatedLinear(parallel, d, rank, 0.0)
            up = column_linear(parallel, rank, width, 1.0, role="input", precise=True)
            self.up[name] = start_orthogonal(up, parallel, 0.1)
        output_std = 0.0 if config.zero_output else context.output_std
        self.o_proj = row_linear(parallel, width, d, output_std)

        index, count = context.index, context.count
        local = (self.num_heads * config.head_dim,)
        for name, exponent in MIX_EXPONENTS.items():
            mix = Mix(exponent * (1 - index / count))
            self.register_parameter(f"mix_{name}", replicated_parameter(parallel, (d,), mix))
        starts: dict[str, Initializer] = {
            "decay_bias": ByChannel("decay", config.head_dim, index / max(count - 1, 1)),
            "rate_bias": ByChannel("rate", config.head_dim),
            "erase_scale": ByChannel("erase", config.head_dim),
            "rate_share": constant(1.02),
            "bonus": constant(-0.04),
        }
        if self.later:
            starts["value_bias"] = ByChannel("value", config.head_dim)
        for name, start in starts.items():
            self.register_parameter(name, gate_parameter(parallel, local, start))
        self.norm = sharded_parameter(parallel, local, constant(((index + 1) / count) ** 0.7))
        self.norm_bias = sharded_parameter(parallel, local, constant(0.0))

    @override
    def forward(
        self,
        x: Tensor,
        *,
        sequences: Sequences | None = None,
        state: State | None = None,
        first: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel)
        new_state: State = {}
        before, last = token_before(x, sequences, None if state is None else state["shift"])
        if last is not None:
            new_state["shift"] = last
        mix = torch.stack([getattr(self, f"mix_{name}") for name in MIX_EXPONENTS])
        mix = head_shared(mix, self.parallel)
        x_r, x_w, x_k, x_v, x_a, x_g = mixed(x, before, mix)
        r, v = self._split(self.r_proj(x_r)), self._split(self._values(x_v, first))
        log_decay = _log_decay(
            self._split(self.up["w"](torch.tanh(self.down["w"](x_w)))), self._vector("decay_bias")
        )
        k, erase, write = _keys(
            self._split(self.k_proj(x_k)),
            self._split(self.up["a"](self.down["a"](x_a))),
            *(self._vector(name) for name in ("rate_bias", "erase_scale", "rate_share")),
        )
        self.note(log_decay=log_decay)
        y, new_state["recurrent"] = dplr(
            r,
            k,
            v,
            erase,
            write,
            log_decay=log_decay,
            scale=1.0,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
            initial_state=None if state is None else state["recurrent"],
            lower_bound=_LEAST_LOG_DECAY,
        )
        gate = self._split(self.up["g"](torch.sigmoid(self.down["g"](x_g))))
        bonus, norm, bias = (self._vector(name) for name in ("bonus", "norm", "norm_bias"))
        eps = self.config.norm_eps * self.config.head_dim
        y = _output(y, r, k, v, gate, bonus, norm, bias, eps)
        return self.o_proj(y.flatten(2).transpose(0, 1)), new_state

    def _values(self, x: Tensor, first: dict[str, Tensor] | None) -> Tensor:
        """Return values ``[T, B, H V]``, and put them into ``first`` or take from there."""
        values: Tensor = self.v_proj(x)
        if self.later:
            assert first is not None
            share = self.up["v"](self.down["v"](x))
            return _with_first(values, first["v"], share, self.value_bias)
        if first is not None and self.config.value_residual:
            first["v"] = values
        return values

    def _split(self, x: Tensor) -> Tensor:
        return heads(x, self.num_heads)

    def _vector(self, name: str) -> Tensor:
        """Return a parameter as ``[H, K]``."""
        vector: Tensor = getattr(self, name)
        return vector.unflatten(0, (self.num_heads, -1))

    @override
    def init_state(self, batch_size: int) -> State:
        config, parallel = self.config, self.parallel
        shape = (self.num_heads, config.head_dim, config.head_dim)
        return {
            "shift": no_token_before(parallel, batch_size, self.hidden_size),
            "recurrent": matrix_state(parallel, batch_size, *shape),
        }

    @classmethod
    @override
    def check(cls, config: RWKV7Config, hidden_size: int) -> None:
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def first_values(cls, config: RWKV7Config, hidden_size: int) -> dict[str, int]:
        return {"v": config.width} if config.value_residual else {}

    @classmethod
    @override
    def added_later(cls, config: RWKV7Config, hidden_size: int) -> tuple[int, int]:
        matrices = config.value_rank * (hidden_size + config.width)
        return matrices + config.width, 2 * matrices

    @classmethod
    def matrices(cls, config: RWKV7Config, hidden_size: int) -> int:
        """Return the parameters of the first layer's projections."""
        low_rank = sum(config.ranks.values()) * (hidden_size + config.width)
        return 4 * hidden_size * config.width + low_rank

    @classmethod
    @override
    def num_parameters(cls, config: RWKV7Config, hidden_size: int) -> int:
        return cls.matrices(config, hidden_size) + 6 * hidden_size + 7 * config.width

    @classmethod
    @override
    def flops_per_token(cls, config: RWKV7Config, hidden_size: int, seq_len: int) -> int:
        dim = config.head_dim
        mixing = dplr_flops(dim, dim, config.chunk_size, per_channel=True)
        return 2 * cls.matrices(config, hidden_size) + config.num_heads * mixing

    @classmethod
    @override
    def state_bytes(cls, config: RWKV7Config, hidden_size: int, seq_len: int) -> int:
        return 4 * config.width * config.head_dim + 2 * hidden_size


@fused
def _with_first(v: Tensor, first: Tensor, share: Tensor, bias: Tensor) -> Tensor:
    """Return ``v + (first - v) sigmoid(share + bias)``, in v's dtype."""
    return (v + (first - v) * torch.sigmoid(share.to(bias.dtype) + bias)).to(v.dtype)


@fused
def _log_decay(w: Tensor, bias: Tensor) -> Tensor:
    """Return log-decays between -e^(-1/2) and 0, in the bias's dtype."""
    return _LEAST_LOG_DECAY * torch.sigmoid(w.to(bias.dtype) + bias)


@fused
def _keys(
    k: Tensor, a: Tensor, bias: Tensor, scale: Tensor, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the key, the erase key and the key that what was erased is written at."""
    wide, rate = k.to(bias.dtype), torch.sigmoid(a.to(bias.dtype) + bias)
    unit = F.normalize(wide * scale, dim=-1, eps=1e-12)
    key = wide * (1 + (rate - 1) * share)
    return key.to(k.dtype), (-unit).to(k.dtype), (unit * rate).to(k.dtype)


@fused
def _output(
    y: Tensor,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    bonus: Tensor,
    norm: Tensor,
    norm_bias: Tensor,
    eps: float,
) -> Tensor:
    """Return what the output projection is given, ``[B, T, H, V]``."""
    dtype = accumulation_dtype(y.dtype)
    wide = F.layer_norm(y.to(dtype), y.shape[-1:], eps=eps) * norm + norm_bias
    wide = wide + (r.to(dtype) * k * bonus).sum(-1, keepdim=True) * v
    return (wide * gate).to(y.dtype)
