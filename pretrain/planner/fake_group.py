"""A rank of a tensor-parallel group that does not exist: for shapes and counts, not for values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from pretrain.parallel.context import ParallelContext


def planned_context(
    dtype: torch.dtype, tensor_size: int, *, sequence_parallel: bool = False
) -> ParallelContext:
    """Return the context of rank 0 of ``tensor_size``, whose collectives do nothing.

    No process group is started or registered: planning leaves no trace in the process.
    """
    if tensor_size == 1:
        return ParallelContext(dtype)
    # torch's type stubs have other signatures than its classes.
    new_group: Any = dist.ProcessGroup
    new_backend: Any = FakeProcessGroup
    group: dist.ProcessGroup = new_group(0, tensor_size)
    fake = new_backend._create_internal(0, tensor_size, new_backend.Options())
    kind = dist.ProcessGroup.BackendType.CUSTOM
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, fake)
    group._set_default_backend(kind)
    return ParallelContext(
        dtype, tensor_size=tensor_size, group=group, sequence_parallel=sequence_parallel
    )
