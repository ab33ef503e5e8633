"""Memora (Miras, arXiv 2504.13173): a memory of distributions, trained in its logarithm.

Every column of a matrix is positive and sums to 1 over its inputs, so that a linear memory is a
convex combination of a key's channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.miras_family import MirasConfig, MirasMixer
from pretrain.ops import MirasRule


@dataclass(frozen=True)
class MemoraConfig(MirasConfig):
    """Settings of Memora."""


@register("memora")
class Memora(MirasMixer):
    """Memora, as a mixer."""

    config_class = MemoraConfig
    card = MixerCard(
        "Memora (Miras)",
        "W_t = softmax(a_t log W_{t-1} - r_t grad norm_2(M(W; k_t) - v_t)^2);  o_t = M(W_t; q_t)",
        "16 H D^2, linear memory 2 H D^2",
        "chunk after chunk",
        "arXiv 2504.13173",
    )

    @classmethod
    @override
    def rule(cls, config: Any) -> MirasRule:
        return MirasRule("l2", retention="softmax")
