"""Products with SiLU and the sigmoid, as gates and MLPs have them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.ops.elementwise.fusing import fused


@fused
def silu_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Return ``x SiLU(gate)``, of one shape and dtype."""
    return x * F.silu(gate)


@fused
def skip_silu_gate(y: Tensor, v: Tensor, weight: Tensor, gate: Tensor) -> Tensor:
    """Return ``(y + weight v) SiLU(gate)`` in gate's dtype, all broadcast to gate's shape."""
    return (y + weight * v).to(gate.dtype) * F.silu(gate)


@fused
def sigmoid_gate(x: Tensor, gate: Tensor) -> Tensor:
    """Return ``x sigmoid(gate)``, of one dtype; the gate is broadcast to x's shape."""
    return x * torch.sigmoid(gate)


@fused
def biased_sigmoid(x: Tensor, bias: Tensor) -> Tensor:
    """Return ``sigmoid(x + bias)`` in the bias's dtype."""
    return torch.sigmoid(x.to(bias.dtype) + bias)


@fused
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``SiLU(gate) up`` (arXiv 2002.05202)."""
    return F.silu(gate) * up
