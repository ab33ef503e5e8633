"""(Gated) DeltaProduct (arXiv 2502.10297): several Householder steps per token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pretrain.common.config_loader import Derived, setting
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.gated_deltanet import GatedDeltaNetConfig


@dataclass(frozen=True)
class DeltaProductConfig(GatedDeltaNetConfig):
    """Settings of (Gated) DeltaProduct."""

    key_share: ClassVar[float] = 1.0
    widest_key: ClassVar[int] = 128

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as many as make the keys of all heads together as wide as the model."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: the largest power of two that is at most 128 and a quarter of the
    model's width, or with ``num_heads`` given the head's share of the keys."""
    expand_v: float = setting(1.0, above=0)
    """Width V of a value as a multiple of a key's."""
    num_householder: int = setting(2, minimum=1)
    """Householder steps per token, each with a key, a value and a beta of its own."""
    allow_neg_eigval: bool = True
    """Whether beta is in (0, 2), which puts the eigenvalues of each factor in (-1, 1), instead of
    (0, 1)."""
    use_decay: bool = True
    """Whether a head has a scalar decay (Gated DeltaProduct)."""


@register("delta_product")
class DeltaProduct(DeltaRuleMixer):
    """DeltaProduct: n Householder steps, decay optional, output gate."""

    config_class = DeltaProductConfig
    card = MixerCard(
        "(Gated) DeltaProduct",
        "S <- a_t S, then n times S <- S + b_j k_j^T (v_j - k_j S);  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform over n T sub-steps",
        "arXiv 2502.10297",
    )

    @classmethod
    def decays(cls, config: DeltaProductConfig) -> bool:
        """Return whether the settings ask for a decay."""
        return config.use_decay
