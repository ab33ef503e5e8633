"""Moneta (Miras, arXiv 2504.13173): errors to the third power, the memory divided by its 4-norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from typing_extensions import override

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.miras_family import MirasConfig, MirasMixer
from pretrain.ops import MirasRule


@dataclass(frozen=True)
class MonetaConfig(MirasConfig):
    """Settings of Moneta."""

    # Divided by its norm, a matrix of many elements changes with the inverse of its size.
    mlp_rate: ClassVar[float] = 1 / 32

    p: float = setting(3.0, minimum=1)
    """The power of errors in the loss; |e| is ``sqrt(e^2 + 1e-6)`` unless it is even."""
    norm: float = setting(4.0, minimum=2)
    """The q of the norm that the memory is divided by; 2: it is not."""
    retention: Literal["norm", "mirror"] = setting("norm")
    """How the norm makes W of the accumulated A: ``norm``, ``A / ||A||_q^(q - 2)``, as published,
    or ``mirror``, its mirror map ``sign(A) |A|^(q - 1) / ||A||_q^(q - 2)``, which grows with A. The
    latter needs W of every token, and so the memory traffic of a plain recurrence, and nothing
    bounds it: with ``p`` above 2 large errors make it diverge, unless ``max_rate`` is small."""


@register("moneta")
class Moneta(MirasMixer):
    """Moneta, as a mixer."""

    config_class = MonetaConfig
    card = MixerCard(
        "Moneta (Miras)",
        "A_t = a_t A_{t-1} - r_t grad norm_p(M(W; k_t) - v_t)^p;  "
        "W_t = A_t / norm_q(A_t)^(q-2);  o_t = M(W_t; q_t)",
        "16 H D^2, linear memory 2 H D^2",
        "chunk after chunk",
        "arXiv 2504.13173",
    )

    @classmethod
    @override
    def rule(cls, config: MonetaConfig) -> MirasRule:
        return MirasRule("lp", config.p, config.retention, config.norm)
