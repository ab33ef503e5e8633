"""RAT: gated averages inside chunks, attention across them."""

from pretrain.ops.rat.dispatch import rat
from pretrain.ops.rat.state import RATState

__all__ = ["RATState", "rat"]
