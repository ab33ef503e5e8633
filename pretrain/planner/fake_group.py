"""Ranks of groups that do not exist: for shapes and counts, not for values."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FakeProcessGroup

from pretrain.parallel.context import CellsOverSegments, ParallelContext

CONTEXT = "context"  # what a group of context-parallel ranks is described as


def planned_context(
    dtype: torch.dtype,
    tensor_size: int,
    *,
    sequence_parallel: bool = False,
    context_size: int = 1,
    context_rank: int = 0,
    context_cells: CellsOverSegments = "chain",
) -> ParallelContext:
    """Return the context of a rank, the first of ``tensor_size``, whose collectives do nothing.

    No process group is started or registered: planning leaves no trace in the process.
    """
    return ParallelContext(
        dtype,
        tensor_size=tensor_size,
        group=fake_group(0, tensor_size, "tensor") if tensor_size > 1 else None,
        sequence_parallel=sequence_parallel and tensor_size > 1,
        context_size=context_size,
        context_rank=context_rank,
        context_group=(
            fake_group(context_rank, context_size, CONTEXT) if context_size > 1 else None
        ),
        context_cells=context_cells,
    )


def fake_group(rank: int, size: int, what: str) -> dist.ProcessGroup:
    """Return a group as rank ``rank`` of ``size`` sees it, whose collectives do nothing."""
    # torch's type stubs have other signatures than its classes.
    new_group: Any = dist.ProcessGroup
    new_backend: Any = FakeProcessGroup
    group: Any = new_group(rank, size)
    fake = new_backend._create_internal(rank, size, new_backend.Options())
    kind = dist.ProcessGroup.BackendType.CUSTOM
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, fake)
    group._set_default_backend(kind)
    group._set_group_desc(what)
    made: dist.ProcessGroup = group
    return made
