"""Yaad (Miras, arXiv 2504.13173): a Huber loss whose threshold every token sets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.miras_family import MirasConfig, MirasMixer
from pretrain.ops import MirasRule


@dataclass(frozen=True)
class YaadConfig(MirasConfig):
    """Settings of Yaad."""


@register("yaad")
class Yaad(MirasMixer):
    """Yaad, as a mixer."""

    config_class = YaadConfig
    gates = "art"
    card = MixerCard(
        "Yaad (Miras)",
        "W_t = a_t W_{t-1} - r_t grad Huber_d(M(W; k_t) - v_t);  o_t = M(W_t; q_t)",
        "16 H D^2, linear memory 2 H D^2",
        "chunk after chunk",
        "arXiv 2504.13173",
    )

    @classmethod
    @override
    def rule(cls, config: Any) -> MirasRule:
        return MirasRule("huber")
