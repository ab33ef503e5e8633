"""Sequence mixers: one file each. To add one, write its file and name it in the import below."""

from pretrain.models.mixers import attention, gated_deltanet  # noqa: F401
from pretrain.models.mixers.base import LayerContext, Mixer, State, register, registry

__all__ = ["LayerContext", "Mixer", "State", "register", "registry"]
