"""Count the bytes that a process sends in a collective of torch.distributed, in a ring."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves


def group_of(arguments: Any) -> dist.ProcessGroup | None:
    """Return the group among an operator's arguments, None where there is none."""
    for x in arguments:
        if isinstance(x, torch.ScriptObject) and "ProcessGroup" in str(x._type()):
            found: dist.ProcessGroup = dist.ProcessGroup.unbox(x)
            return found
    return None


def bytes_sent(name: str, arguments: Any, group: dist.ProcessGroup) -> float:
    """Return the bytes that this process sends in the operator ``name`` of torch's ``c10d``."""
    if "recv" in name or "barrier" in name:
        return 0.0
    # The larger side of a gather, and of what is scattered, is the whole.
    total = max((_bytes(x) for x in arguments), default=0)
    if name.startswith("send"):
        return float(total)
    if "alltoall_base" in name:
        _, message, _, _, splits, *_ = arguments
        if splits:
            own = splits[group.rank()] / max(sum(splits), 1)
            return _bytes(message) * (1 - own)
        total = _bytes(message)
    share = (group.size() - 1) / group.size()
    return share * total * (2 if "allreduce" in name else 1)


def _bytes(argument: Any) -> int:
    tensors = [x for x in tree_leaves(argument) if isinstance(x, Tensor)]
    return sum(x.numel() * x.element_size() for x in tensors)
