"""DeltaNet (arXiv 2406.06484): the delta rule without decay and without an output gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from pretrain.common.config_loader import Derived, setting
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.gated_deltanet import GatedDeltaNetConfig


@dataclass(frozen=True)
class DeltaNetConfig(GatedDeltaNetConfig):
    """Settings of DeltaNet."""

    key_share: ClassVar[float] = 1.0
    widest_key: ClassVar[int] = 128

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as many as make the keys of all heads together as wide as the model."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: the largest power of two that is at most 128 and a quarter of the
    model's width, or with ``num_heads`` given the head's share of the keys."""
    expand_v: float = setting(1.0, above=0)
    """Width V of a value as a multiple of a key's."""


@register("deltanet")
class DeltaNet(DeltaRuleMixer):
    """DeltaNet: no decay, no output gate, one Householder step."""

    config_class = DeltaNetConfig
    output_gate = False
    card = MixerCard(
        "DeltaNet",
        "S_t = (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform",
        "arXiv 2406.06484",
    )

    @classmethod
    def decays(cls, config: Any) -> bool:
        """Return False: DeltaNet has no decay."""
        return False
