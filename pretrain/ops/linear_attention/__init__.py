"""Linear attention with decays: linear attention, RetNet, Mamba-2, GLA, HGRN2."""

from pretrain.ops.linear_attention.dispatch import linear_attention

__all__ = ["linear_attention"]
