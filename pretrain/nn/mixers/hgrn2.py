"""HGRN2 (arXiv 2404.07904): the forget gate is the key's complement.

f = lb + (1 - lb) sigmoid(W_f x), S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T (W_i x_t), read by
SiLU(W_q x); RMSNorm over the full width, through W_o. lb, the least a gate may be, rises with
depth (see :mod:`pretrain.nn.mixers.lower_bounds`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import column_input, column_linear, row_linear
from pretrain.nn.mixers.base import (
    LayerContext,
    Mixer,
    MixerCard,
    MixerConfig,
    State,
    heads,
    register,
)
from pretrain.nn.mixers.conversion import Conversion, head_sizes
from pretrain.nn.mixers.lower_bounds import (
    LowerBound,
    add_lower_bound,
    forget_above,
    lower_bound,
    lower_bound_tables,
)
from pretrain.nn.mixers.mitigations import ALL, recur
from pretrain.nn.mixers.parts import linear_attention_flops, matrix_state, power_of_two
from pretrain.nn.mixers.sizes import integral, split_width
from pretrain.nn.norm import sharded_rms_norm
from pretrain.nn.parameters import constant, sharded_parameter
from pretrain.ops import linear_attention
from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class HGRN2Config(MixerConfig):
    """Settings of HGRN2; values are ``hidden_size / num_heads`` wide."""

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: ``hidden_size / head_dim``."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: ``hidden_size / num_heads`` or, where that is null too, 128, a
    quarter of a smaller width, or what divides the width near that."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    lower_bound: LowerBound = setting("own")
    """The least a forget gate may be: learnt by every layer for itself (``own``), or by all hgrn2
    layers together (``shared``), so that it rises from 0 in the first to the last."""
    chunk_size: int = setting(64, minimum=1)
    """Tokens handled at once by the chunked form, a power of two, which changes speed alone."""

    @override
    def resolve(self, hidden_size: int) -> Self:
        num_heads, head_dim = self.num_heads, self.head_dim
        if num_heads is None and head_dim is None:
            num_heads, head_dim = split_width(hidden_size, 128)
        num_heads = num_heads or integral(hidden_size / head_dim, "hidden_size / head_dim")
        head_dim = head_dim or integral(hidden_size / num_heads, "hidden_size / num_heads")
        return replace(self, num_heads=num_heads, head_dim=head_dim)

    def shape(self, hidden_size: int) -> tuple[int, int, int]:
        """Return (num_heads, key width, value width).

        Raises ValueError where heads do not divide the model's width.
        """
        value_dim = integral(hidden_size / self.num_heads, "hidden_size / num_heads")
        return self.num_heads, self.head_dim, value_dim


def _sizes_of_attention(attention: Mapping[str, Any], hidden_size: int) -> dict[str, Any]:
    """Return the settings with an attention layer's heads, which must be as wide as the model."""
    sizes = head_sizes(attention, hidden_size)
    if (width := sizes["num_heads"] * sizes["head_dim"]) != hidden_size:
        raise ValueError(
            f"its values are as wide as the model, {hidden_size}, and the attention's {width}"
        )
    return sizes


@register("hgrn2")
class HGRN2(Mixer):
    """HGRN2, as a mixer.

    Its state is S ``[N, H, K, V]`` in float32.
    """

    config_class = HGRN2Config
    over_time = "ops"
    mitigable = ALL
    # Keys are what the forget gates leave, so that they are learnt anew.
    conversion = Conversion(_sizes_of_attention, {"q_proj": "q", "i_proj": "v", "o_proj": "o"})
    card = MixerCard(
        "HGRN2",
        "S_t = Diag(f_t) S_{t-1} + (1 - f_t)^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, pairs by halving",
        "arXiv 2404.07904",
    )

    def __init__(self, config: HGRN2Config, context: LayerContext):
        super().__init__(config, context)
        self.config, self.parallel = config, context.parallel
        d, parallel = context.hidden_size, context.parallel
        num_heads, self.key_dim, self.value_dim = config.shape(d)
        self.num_heads = parallel.local(num_heads, "num_heads")
        k_dim, v_dim = num_heads * self.key_dim, num_heads * self.value_dim
        self.q_proj = column_linear(parallel, d, k_dim, context.std)
        self.f_proj = column_linear(parallel, d, k_dim, context.std)
        self.i_proj = column_linear(parallel, d, v_dim, context.std)
        self.o_proj = row_linear(parallel, v_dim, d, context.output_std)
        add_lower_bound(self, context, config.lower_bound, num_heads * self.key_dim)
        width = self.num_heads * self.value_dim
        self.norm = sharded_parameter(parallel, (width,), constant(1.0))

    @override
    def forward(
        self, x: Tensor, *, sequences: Sequences | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        x = column_input(x, self.parallel, self)
        q = recomputed(F.silu, self.q_proj(x))
        closing, log_f = forget_above(self.f_proj(x), lower_bound(self))
        q, k, log_f = (heads(t, self.num_heads) for t in (q, closing, log_f))
        v = heads(self.i_proj(x), self.num_heads)
        new_state: State = {}
        y = recur(
            self,
            linear_attention,
            q,
            k,
            v,
            state=state,
            new_state=new_state,
            log_decay=log_f,
            sequences=sequences,
            chunk_size=self.config.chunk_size,
        )
        y = sharded_rms_norm(y.flatten(2), self.norm, self.config.norm_eps, self.parallel)
        return self.o_proj(y.transpose(0, 1)), new_state

    @override
    def init_state(self, batch_size: int) -> State:
        shape = (batch_size, self.num_heads, self.key_dim, self.value_dim)
        return {"recurrent": matrix_state(self.parallel, *shape)}

    @classmethod
    @override
    def check(cls, config: HGRN2Config, hidden_size: int) -> None:
        config.shape(hidden_size)
        power_of_two(config.chunk_size)

    @classmethod
    @override
    def sharded_counts(cls, config: HGRN2Config, hidden_size: int) -> dict[str, int]:
        return {"num_heads": config.shape(hidden_size)[0]}

    @classmethod
    @override
    def num_parameters(cls, config: HGRN2Config, hidden_size: int) -> int:
        num_heads, key_dim, value_dim = config.shape(hidden_size)
        matrices = 2 * hidden_size * num_heads * (key_dim + value_dim)
        bound = key_dim if config.lower_bound == "own" else 0
        return matrices + num_heads * (value_dim + bound)

    @classmethod
    @override
    def shared_tables(cls, config: HGRN2Config, hidden_size: int) -> dict[str, int]:
        num_heads, key_dim, _ = config.shape(hidden_size)
        return lower_bound_tables(config.lower_bound, num_heads * key_dim)

    @classmethod
    @override
    def flops_per_token(cls, config: HGRN2Config, hidden_size: int, seq_len: int) -> int:
        num_heads, key_dim, value_dim = config.shape(hidden_size)
        mixing = linear_attention_flops(key_dim, value_dim, config.chunk_size, per_channel=True)
        return num_heads * (4 * hidden_size * (key_dim + value_dim) + mixing)

    @classmethod
    @override
    def state_bytes(cls, config: HGRN2Config, hidden_size: int, seq_len: int) -> int:
        num_heads, key_dim, value_dim = config.shape(hidden_size)
        return 4 * num_heads * key_dim * value_dim
