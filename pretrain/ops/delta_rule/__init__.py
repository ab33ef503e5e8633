"""The delta rules: DeltaNet, Gated DeltaNet, Kimi delta attention, DeltaProduct."""

from pretrain.ops.delta_rule.dispatch import delta_rule

__all__ = ["delta_rule"]
