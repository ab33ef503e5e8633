"""torch.distributed.checkpoint as the format of a checkpoint's tensors.

Every process writes files of its own, ``__RANK_N.distcp``, without exchanging anything; the main
one writes ``.metadata``, which says where each part of a tensor lies.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    ReadItem,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from pretrain.checkpoint.metadata import read_metadata
from pretrain.checkpoint.sharded_state import Boxes, State, StorageError


class _Entry:
    """Boxes under the names that torch.distributed.checkpoint looks for."""

    def __init__(self, boxes: Boxes):
        self.boxes, self.size = boxes, boxes.size

    def _chunks(self) -> Iterator[tuple[ChunkStorageMetadata, Tensor]]:
        for offsets, tensor in self.boxes.parts.items():
            yield ChunkStorageMetadata(offsets=offsets, sizes=tensor.size()), tensor

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk, TensorProperties.create_from_tensor(tensor), self.boxes.full_shape
                ),
            )
            for chunk, tensor in self._chunks()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self._chunks()]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        return self.state_dict[index.fqn].boxes.parts[index.offset]


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False
    ) -> None:
        # Not the inherited method, which makes None of what is not a tensor.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        # The inherited method unpickles; a checkpoint of ours has tensors alone.
        raise CheckpointException(f"{read_item.dest_index.fqn} is no tensor", {})

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self.state_dict[index.fqn].boxes.parts[index.offset]


class _Reader(dcp.FileSystemReader):
    def __init__(self, folder: Path):
        super().__init__(folder)
        self._metadata = read_metadata(folder)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        # Not the inherited method, which unpickles whatever the file names.
        return self._metadata


def _entries(state: State) -> dict[str, Any]:
    return {name: _Entry(boxes) for name, boxes in state.items() if boxes.parts}


class _FileSystem(FileSystem):
    """Files whose failure is reported by what the system said.

    ``torch.save`` hides it: it writes an end to what it could not write, and reports that.
    """

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        errors: list[OSError] = []
        try:
            with super().create_stream(path, mode) as stream:
                yield cast(io.IOBase, _Stream(stream, errors))
        except Exception:
            if not errors:
                raise
            raise OSError(errors[0].errno, errors[0].strerror, str(path)) from None


class _Stream:
    """A stream that keeps the first error of its writing."""

    def __init__(self, stream: Any, errors: list[OSError]):
        self._stream, self._errors = stream, errors

    def write(self, content: Any) -> int:
        try:
            return int(self._stream.write(content))
        except OSError as error:
            self._errors.append(error)
            raise

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _Writer(dcp.FileSystemWriter):
    def __init__(self, folder: Path):
        # Copying ahead would wait for the GPU's stream, and the tensors are on the CPU.
        super().__init__(folder, per_thread_copy_ahead=0)
        self.fs = _FileSystem()


def save(state: State, folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the parts of all processes into ``folder``; all processes of ``group`` must call.

    Raises OSError or StorageError, on every process, where one could not write.
    """
    try:
        dcp.save(
            _entries(state),
            storage_writer=_Writer(folder),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from None
        raise StorageError(str(error)) from None


def load(state: State, folder: Path) -> None:
    """Fill the tensors in place; each process reads for itself.

    Nothing in ``folder`` is run. Raises StorageError where it lacks a name or has it in another
    shape, and UserError where its table of tensors is unreadable.
    """
    reader = _Reader(folder)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*load in a single process")
            dcp.load(
                _entries(state),
                storage_reader=reader,
                planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
                no_dist=True,
            )
    except CheckpointException as error:
        raise StorageError(str(error)) from None


def files_of(folder: Path, rank: int) -> Iterator[Path]:
    """Yield the files that a process of this rank has written."""
    yield from folder.glob(f"__{rank}_*")
