"""Models of other libraries in terms of ours: one table for each family, read both ways."""

from pretrain.export.families.attention import Llama, Qwen3
from pretrain.export.families.base import Family, Weight, to_ours, to_theirs
from pretrain.export.families.mamba2 import Mamba2

# The first that a model fits is what it is exported as.
FAMILIES: tuple[Family, ...] = (Llama(), Qwen3(), Mamba2())

__all__ = ["FAMILIES", "Family", "Weight", "to_ours", "to_theirs"]
