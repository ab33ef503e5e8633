"""How a training program runs the layers on a GPU: what a plan assumes besides the hardware."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Software:
    """How a training program runs the layers on a GPU; the default is this project's own way.

    Others are there so that published measurements of other programs can be planned
    (benchmarks/planner_calibration.py).
    """

    elementwise: Literal["fused", "eager"] = "fused"
    """Chains of elementwise operations as one kernel, or each operation as its own."""
    attention: Literal["flash1", "flash2"] = "flash2"
    """Generation of the attention kernel: ``flash2`` is what torch itself brings."""
    product_time: float = 1.0
    """Time of matrix products, relative to what the hardware's file says."""
    elementwise_time: float = 1.0
    """Time of elementwise operations, relative to the hardware's file."""
    delta_rule_time: float = 1.0
    """Time of the kernels of delta rules, relative to today's flash-linear-attention."""
    linear_attention_time: float = 1.0
    """Time of the kernels of linear attention, relative to today's flash-linear-attention."""
    step_time: float = 1.0
    """Time of a step inside kernels of non-linear recurrences, relative to this project's."""
    shares_keys: bool = False
    """Whether kernels take one key for the heads that share it (Mamba-2), in place of copies."""
    overlaps_tensor: bool = True
    """Whether exchanges of tensor parallelism run beside the weights' gradients."""
    recomputed_products: float = 0.0
    """Share of the forward pass's matrix products that selective checkpointing computes again."""
    logits_bytes: float = 0.0
    """Bytes per logit of all tokens that are stored at once, on every process; 0: as here."""
    state_bytes: float | None = None
    """Bytes per parameter of weights, gradients and optimizer together; None: as here."""
    whole_gradients: float = 0.0
    """Beside ``state_bytes``, bytes per parameter of gradients that no sharding divides."""
