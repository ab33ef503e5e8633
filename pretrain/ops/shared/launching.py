"""Launches of kernels, and the conditions for them.

Kernels are imported only where they are used, so that triton is needed only there. With
``TRITON_INTERPRET=1`` they run on a CPU, slowly: so the tests run them without a GPU, in float64
too. No kernel sums with atomic operations, so the same input gives the same bits.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

from pretrain.ops.shared.planning import Work, observe

SCHEDULERS = 528  # of an H100 or H200


def launch(kernel: Any, grid: tuple[int, ...], work: Work, *arguments: Any, **options: Any) -> None:
    """Run ``kernel``, which does ``work``, unless there is nothing to do.

    On the meta device, where plans are made, nothing runs and the work is reported.
    """
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if any(x.is_meta for x in tensors):
        observe(work, sum(x.nbytes for x in tensors), tensors[0].dtype)
    elif all(grid):
        # Triton launches on the current device, whatever device the tensors are on.
        with torch.cuda.device(tensors[0].device) if tensors[0].is_cuda else nullcontext():
            kernel[grid](*arguments, **options)


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, on any device."""
    return bool(triton.knobs.runtime.interpret)


def approximate(dtype: torch.dtype) -> bool:
    """Return whether a kernel on ``dtype`` may take the hardware's tanh."""
    return not interpreted() and dtype in (torch.bfloat16, torch.float16)


def schedulers(device: torch.device) -> int:
    """Return how many schedulers of warps a GPU has; of any other device an H200's."""
    if device.type != "cuda":
        return SCHEDULERS
    return 4 * torch.cuda.get_device_properties(device).multi_processor_count


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least ``n``."""
    return 1 << max(n - 1, 0).bit_length()
