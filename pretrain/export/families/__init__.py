"""Models of other libraries in terms of ours: one table for each family, read both ways."""

from pretrain.export.families.attention import Llama, Olmo2, Qwen2, Qwen3
from pretrain.export.families.bamba import Bamba
from pretrain.export.families.base import Family, Weight, to_ours, to_theirs
from pretrain.export.families.experts import Mixtral, Qwen3MoE
from pretrain.export.families.fla import (
    HGRN,
    HGRN2,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    KimiDeltaAttention,
    RetNet,
)
from pretrain.export.families.granite import GraniteHybrid
from pretrain.export.families.mamba2 import Mamba2
from pretrain.export.families.olmo_hybrid import OlmoHybrid
from pretrain.export.families.qwen3_5 import Qwen35
from pretrain.export.families.qwen3_next import Qwen3Next
from pretrain.export.families.rwkv7 import RWKV7
from pretrain.export.families.xlstm import XLSTM

# The first that a model fits is what it is exported as.
FAMILIES: tuple[Family, ...] = (
    Llama(),
    Qwen2(),
    Qwen3(),
    Olmo2(),
    Mixtral(),
    Qwen3MoE(),
    Mamba2(),
    Bamba(),
    GraniteHybrid(),
    Qwen35(),
    Qwen3Next(),
    OlmoHybrid(),
    XLSTM(),
    GatedDeltaNet(),
    DeltaNet(),
    GatedLinearAttention(),
    RetNet(),
    HGRN(),
    HGRN2(),
    KimiDeltaAttention(),
    RWKV7(),
)

__all__ = ["FAMILIES", "Family", "Weight", "to_ours", "to_theirs"]
