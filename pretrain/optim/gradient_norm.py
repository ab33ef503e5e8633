"""The norm of gradients that lie on many processes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.parallel.processes import local_device


def global_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> float:
    """Return the norm of all gradients that the processes of ``group`` pass.

    Each tensor is counted once by whoever passes it. Squares are summed in float64: in float32
    torch's norm on the CPU is 1e-4 off for half a million elements, and megatron-core's fallback
    with it.
    """
    total = torch.zeros((), dtype=torch.float64, device=local_device())
    if gradients:
        norms = torch._foreach_norm([g.detach() for g in gradients], 2, dtype=torch.float64)
        total += torch.stack(norms).square().sum()
    dist.all_reduce(total, group=group)
    return float(total.sqrt())
