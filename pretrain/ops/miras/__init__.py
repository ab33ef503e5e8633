"""Memories trained online: Moneta, Yaad and Memora."""

from pretrain.ops.miras.dispatch import miras
from pretrain.ops.miras.rule import MirasRule, MirasState

__all__ = ["MirasRule", "MirasState", "miras"]
