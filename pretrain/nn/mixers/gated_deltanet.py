"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a scalar decay per head."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.base import MixerCard, register, whole
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """head_dim: width of a key (K); a value is expand_v times as wide (V); conv_size: taps of the
    short convolution, 0 = none; allow_neg_eigval: beta in (0, 2) instead of (0, 1); chunk_size:
    sub-steps handled at once by the chunked form, which changes speed alone."""

    num_heads: int = setting(6, minimum=1)
    head_dim: int = setting(256, minimum=1)
    expand_v: float = setting(2.0, above=0)
    conv_size: int = setting(4, minimum=0)
    allow_neg_eigval: bool = False
    norm_eps: float = setting(1e-5, above=0)
    chunk_size: int = setting(64, minimum=1)

    @property
    def value_dim(self) -> int:
        return whole(self.head_dim * self.expand_v, "head_dim * expand_v")


@register("gdn")
class GatedDeltaNet(DeltaRuleMixer):
    """Scalar decay, output gate, one Householder step."""

    config_class = GatedDeltaNetConfig
    card = MixerCard(
        "Gated DeltaNet",
        "S_t = a_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform",
        "arXiv 2412.06464",
    )
