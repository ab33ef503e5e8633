"""Softmax attention and rotary position embedding."""

from pretrain.ops.attention.dispatch import attention
from pretrain.ops.attention.rotary import apply_rotary, rotary_embedding, rotary_of

__all__ = ["apply_rotary", "attention", "rotary_embedding", "rotary_of"]
