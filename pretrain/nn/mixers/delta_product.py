"""(Gated) DeltaProduct (arXiv 2502.10297): several Householder steps per token."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.common.config_loader import setting
from pretrain.nn.mixers.base import MixerCard, register
from pretrain.nn.mixers.delta_rule import DeltaRuleMixer
from pretrain.nn.mixers.gated_deltanet import GatedDeltaNetConfig


@dataclass(frozen=True)
class DeltaProductConfig(GatedDeltaNetConfig):
    """num_householder: steps per token, each with a key, a value and a beta of its own;
    allow_neg_eigval: beta in (0, 2), eigenvalues of each factor in (-1, 1), else (0, 1); use_decay:
    a scalar decay per head (Gated DeltaProduct). All else as for ``gdn``."""

    head_dim: int = setting(128, minimum=1)
    expand_v: float = setting(1.0, above=0)
    num_householder: int = setting(2, minimum=1)
    allow_neg_eigval: bool = True
    use_decay: bool = True


@register("delta_product")
class DeltaProduct(DeltaRuleMixer):
    """n Householder steps, decay optional, output gate."""

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
        """Where the settings say so."""
        return config.use_decay
