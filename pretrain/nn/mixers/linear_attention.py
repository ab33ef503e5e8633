"""Linear attention (arXiv 2006.16236): no decay, a feature map on queries and keys.

``product`` is the learned map (W_a x + b_a) * (W_b x + b_b) within a head, its weights shared by
the heads, with maps of their own for q and k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.data.sequences import Sequences
from pretrain.nn.linear import head_shared
from pretrain.nn.mixers.base import LayerContext, MixerCard, State, register
from pretrain.nn.mixers.linear_family import LinearFamilyConfig, LinearFamilyMixer
from pretrain.nn.parameters import constant, normal, replicated_parameter
from pretrain.ops.elementwise.fusing import fused
from pretrain.ops.shared.recomputation import recomputed


@dataclass(frozen=True)
class LinearAttentionConfig(LinearFamilyConfig):
    """Settings of linear attention."""

    feature_map: Literal["product", "elu", "relu", "identity"] = setting("product")
    """Map of queries and keys: a learned ``product`` of two linear maps, elu + 1, relu, or
    nothing."""
    normalize: bool = False
    """Whether the output is divided by q_t times the sum of keys so far; with ``elu`` or ``relu``
    alone."""


@register("linear_attn")
class LinearAttention(LinearFamilyMixer):
    """Linear attention, as a mixer.

    Its state is S ``[N, H, K, V]`` in float32; with ``normalize`` one more column, the sum of keys.
    """

    config_class = LinearAttentionConfig
    mitigable = ("write_scale", "norm_limit", "window")  # there is no decay
    output_gate = False
    card = MixerCard(
        "linear attention",
        "S_t = S_{t-1} + f(k_t)^T v_t;  o_t = f(q_t) S_t",
        "H K V",
        "chunks",
        "arXiv 2006.16236",
    )

    def __init__(self, config: LinearAttentionConfig, context: LayerContext):
        super().__init__(config, context)
        if config.feature_map == "product":
            dim, parallel = self.key_dim, self.parallel
            for name in "qk":
                weight = replicated_parameter(parallel, (2, dim, dim), normal(dim**-0.5))
                self.register_parameter(f"{name}_map", weight)
                bias = replicated_parameter(parallel, (2, 1, dim), constant(0.0), decay=False)
                self.register_parameter(f"{name}_map_bias", bias)

    def _features(self, name: str, x: Tensor) -> Tensor:
        kind = self.config.feature_map
        if kind == "elu":
            return _elu_map(x)
        if kind == "relu":
            return recomputed(F.relu, x)
        if kind == "identity":
            return x
        weight, bias = (
            head_shared(getattr(self, name), self.parallel)
            for name in (f"{name}_map", f"{name}_map_bias")
        )
        rows = x.reshape(1, -1, self.key_dim).expand(2, -1, -1)
        first, second = torch.baddbmm(bias, rows, weight)
        return _product(first, second).view(x.shape)

    def prepare(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sequences: Sequences | None,
        state: State | None,
        new_state: State,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Apply the feature maps, and append a column of ones to sum the keys."""
        if self.config.normalize:
            v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
        return self._features("q", q), self._features("k", k), v

    def finish(self, y: Tensor) -> Tensor:
        """Divide by the sum of weights, where there is one."""
        if not self.config.normalize:
            return y
        return _divided(y)

    @classmethod
    def state_width(cls, config: LinearAttentionConfig, value_dim: int) -> int:
        """Return the columns of the state, one more with ``normalize``."""
        return value_dim + config.normalize

    @classmethod
    @override
    def check(cls, config: LinearAttentionConfig, hidden_size: int) -> None:
        super().check(config, hidden_size)
        if config.normalize and config.feature_map not in ("elu", "relu"):
            raise ValueError(
                f"normalize needs a feature_map that is never negative (elu, relu), found "
                f"{config.feature_map}"
            )

    @classmethod
    def extras(cls, config: LinearAttentionConfig, hidden_size: int) -> tuple[int, int]:
        """Return the parameters and FLOPs per token of the learned feature maps."""
        if config.feature_map != "product":
            return 0, 0
        key_dim = config.head_dim
        return 4 * key_dim * (key_dim + 1), 8 * key_dim**2 * config.num_heads


@fused
def _elu_map(x: Tensor) -> Tensor:
    return F.elu(x) + 1


@fused
def _product(first: Tensor, second: Tensor) -> Tensor:
    return first * second


@fused
def _divided(y: Tensor) -> Tensor:
    """Return all columns but the last of y, divided by the last."""
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    return (wide[..., :-1] / (wide[..., -1:] + 1e-10)).to(y.dtype)
