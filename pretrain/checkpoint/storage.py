"""The formats in which a checkpoint's tensors are stored: one is written, all are read.

A format is a module of this package that is named below, with ``save``, ``load`` and ``files_of``
as :class:`StorageFormat` has them. It is imported when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol, cast

import torch.distributed as dist

from pretrain.checkpoint.sharded_state import State
from pretrain.common.deferred_imports import deferred_imports

WRITTEN = "torch_distributed"
# By module: the file by which a checkpoint of that format is recognised.
FORMATS = {"torch_distributed": ".metadata"}
_OF_CHECKPOINTS = ("torch.distributed.checkpoint", "torch.distributed._state_dict_utils")
# What torch's checkpoints import for tensors and shards that ours have not, sympy with it: most of
# their time. Each with the module that defines its classes.
_USED_BY_NO_CHECKPOINT = {
    "torch.distributed.elastic.agent.server.api": "torch.distributed.elastic.agent.server.api",
    "torch.distributed.fsdp._shard_utils": "torch.distributed.fsdp._shard_utils",
    "torch.distributed.tensor": "torch.distributed.tensor",
    "torch.distributed.tensor._utils": "torch.distributed.tensor",
}


class StorageFormat(Protocol):
    """The interface of a module that implements a storage format."""

    def save(self, state: State, folder: Path, group: dist.ProcessGroup | None) -> None:
        """Write the parts of all processes into ``folder``; all of ``group`` must call."""

    def load(self, state: State, folder: Path) -> None:
        """Fill the tensors in place; each process reads for itself."""

    def files_of(self, folder: Path, rank: int) -> Iterable[Path]:
        """Return the files that a process of this rank has written."""


def storage(name: str = WRITTEN) -> StorageFormat:
    """Return the module of a format."""
    with deferred_imports(_OF_CHECKPOINTS, _USED_BY_NO_CHECKPOINT):
        return cast(StorageFormat, importlib.import_module(f"pretrain.checkpoint.{name}"))


def save_state(state: State, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the parts of all processes into ``folder``; all processes of ``group`` must call.

    Raises OSError or StorageError, on every process, where one could not write.
    """
    storage().save(state, folder, group)


def load_state(state: State, folder: Path) -> None:
    """Fill the tensors in place, in whichever format they are; each process reads for itself.

    Raises StorageError where the folder lacks a name or has it in another shape.
    """
    found = [name for name, index in FORMATS.items() if (folder / index).is_file()]
    storage(found[0] if found else WRITTEN).load(state, folder)
    for boxes in state.values():
        for copy in boxes.copies:
            for offsets, tensor in copy.parts.items():
                tensor.copy_(boxes.parts[offsets])
