"""The depthwise causal convolution over time."""

from pretrain.ops.short_convolution.dispatch import short_convolution

__all__ = ["short_convolution"]
