"""Gated DeltaNet (arXiv 2412.06464): the delta rule with a scalar decay per head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

from typing_extensions import override

from pretrain.common.config_loader import Derived, setting
from pretrain.nn.mixers.base import MixerCard, MixerConfig, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.sizes import delta_rule_sizes, integral


@dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """Settings of Gated DeltaNet."""

    # Of all keys together as a share of the model's width, and of one at most, where not given.
    key_share: ClassVar[float] = 0.75
    widest_key: ClassVar[int] = 256
    head_counts: ClassVar[tuple[str, ...]] = ("num_heads", "num_qk_heads")

    num_heads: Derived = setting(None, minimum=1)
    """Heads; null: as many as make the keys of all heads together about 0.75 times as wide as the
    model."""
    num_qk_heads: Derived = setting(None, minimum=1)
    """Heads of queries and of keys, a divisor of ``num_heads``, which share them; null: as many."""
    head_dim: Derived = setting(None, minimum=1)
    """Width K of a key; null: the largest power of two that is at most 256 and a quarter of the
    model's width, or with ``num_heads`` given the head's share of the keys."""
    expand_v: float = setting(2.0, above=0)
    """Width V of a value as a multiple of a key's."""
    conv_size: int = setting(4, minimum=0)
    """Taps of the short convolution over queries, keys and values; 0: there is none."""
    allow_neg_eigval: bool = False
    """Whether beta is in (0, 2) instead of (0, 1), which makes negative eigenvalues possible (arXiv
    2411.12537)."""
    norm_eps: float = setting(1e-5, above=0)
    """Added to the mean square in the norm of the output."""
    chunk_size: int = setting(64, minimum=1)
    """Sub-steps handled at once by the chunked form, which changes speed alone."""

    @property
    def value_dim(self) -> int:
        """Return the width V of a value."""
        return integral(self.head_dim * self.expand_v, "head_dim * expand_v")

    @override
    def resolve(self, hidden_size: int) -> Self:
        sizes = delta_rule_sizes(
            hidden_size, self.num_heads, self.head_dim, self.key_share, self.widest_key
        )
        qk_heads = self.num_qk_heads or sizes[0]
        return replace(self, num_heads=sizes[0], num_qk_heads=qk_heads, head_dim=sizes[1])


@register("gdn")
class GatedDeltaNet(DeltaRuleMixer):
    """Gated DeltaNet: scalar decay, output gate, one Householder step."""

    config_class = GatedDeltaNetConfig
    card = MixerCard(
        "Gated DeltaNet",
        "S_t = a_t (I - b_t k_t^T k_t) S_{t-1} + b_t k_t^T v_t;  o_t = q_t S_t",
        "H K V",
        "chunks, UT transform",
        "arXiv 2412.06464",
    )
