"""Recurrences whose transition is diagonal plus low rank: RWKV-7, Gated DeltaNet-2, Comba."""

from pretrain.ops.dplr.dispatch import comba, dplr, gdn2

__all__ = ["comba", "dplr", "gdn2"]
