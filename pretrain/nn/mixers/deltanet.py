"""DeltaNet (arXiv 2406.06484): the delta rule without decay and without an output gate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.gated_deltanet import GatedDeltaNetConfig


@dataclass(frozen=True)
class DeltaNetConfig(GatedDeltaNetConfig):
    """As for ``gdn``, with defaults of its own."""

    num_heads: int = setting(16, minimum=1)
    head_dim: int = setting(128, minimum=1)
    expand_v: float = setting(1.0, above=0)


@register("deltanet")
class DeltaNet(DeltaRuleMixer):
    """No decay, no output gate, one Householder step."""

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
        """Never."""
        return False
