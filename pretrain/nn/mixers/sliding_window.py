"""Softmax attention over the last tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.attention import Attention, AttentionConfig
from pretrain.nn.mixers.base import MixerCard, register


@dataclass(frozen=True)
class SlidingWindowConfig(AttentionConfig):
    """Settings of sliding-window attention, those of ``attn`` with a window."""

    window: int | None = setting(2048, minimum=1)
    """Tokens that a token sees, itself included; never null."""


@register("swa")
class SlidingWindowAttention(Attention):
    """Softmax attention with a window; see :class:`Attention`."""

    config_class = SlidingWindowConfig
    card = MixerCard(
        "sliding-window attention",
        "o_t = sum_{t-w<j<=t} softmax_j(q_t k_j / sqrt D) v_j",
        "keys and values of w tokens",
        "flash or scaled-dot-product attention",
        "arXiv 2004.05150",
    )

    @classmethod
    @override
    def check(cls, config: AttentionConfig, hidden_size: int) -> None:
        if config.window is None:
            raise ValueError("window is null, expected a number; 'attn' is the mixer without one")
        super().check(config, hidden_size)
