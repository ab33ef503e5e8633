"""The mesa layer: ridge regression over the past, solved for every token."""

from pretrain.ops.mesa.dispatch import mesa

__all__ = ["mesa"]
