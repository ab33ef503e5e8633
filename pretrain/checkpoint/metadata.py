"""Read ``.metadata`` of torch.distributed.checkpoint, which is a pickle, as data alone.

A pickle may call any function that it names. This one is read by a list of what the file needs: the
classes of its table, sizes, dtypes and paths; a file that names anything else is refused unread.
"""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.serialization import _get_layout

from pretrain.common.errors import UserError

FILE = ".metadata"
_CLASSES = (
    metadata.ChunkStorageMetadata,
    metadata.Metadata,
    metadata.MetadataIndex,
    metadata.StorageMeta,
    metadata.TensorProperties,
    metadata.TensorStorageMetadata,
    metadata._MEM_FORMAT_ENCODING,
    filesystem._StorageInfo,
    torch.Size,
)
_DTYPES = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_ALLOWED: dict[tuple[str, str], Any] = {
    **{(kind.__module__, kind.__qualname__): kind for kind in _CLASSES},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch.serialization", "_get_layout"): _get_layout,
    # Where the checkpoint was written, which nothing reads; versions of Python name it differently.
    ("pathlib", "PosixPath"): PurePosixPath,
    ("pathlib._local", "PosixPath"): PurePosixPath,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Return what the file names, if it is on the list."""
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refuse what refers to outside the file."""
        raise pickle.UnpicklingError("it refers to something outside of it")


def read_metadata(folder: Path) -> metadata.Metadata:
    """Return the table of a checkpoint's tensors: shapes, and where their parts lie.

    Raises UserError where the file is unreadable, or holds anything but tensors in files of
    ``folder``.
    """
    path = folder / FILE
    try:
        with path.open("rb") as file:
            return _checked(_Unpickler(file).load())
    except Exception as error:  # a damaged pickle raises anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path} is not the table of a checkpoint's tensors ({reason}): it is damaged, or was "
            "made to run code here; copy the checkpoint once more from where it was trained"
        ) from None


def _checked(found: Any) -> metadata.Metadata:
    if not (isinstance(found, metadata.Metadata) and isinstance(found.storage_data, dict)):
        raise ValueError("it holds something else")
    for name, entry in found.state_dict_metadata.items():
        if not isinstance(entry, metadata.TensorStorageMetadata):
            raise ValueError(f"{name} is no tensor")
    for index, place in found.storage_data.items():
        file = place.relative_path
        if Path(file).name != file or not file.endswith(filesystem.DEFAULT_SUFFIX):
            raise ValueError(f"{index.fqn} lies outside of the checkpoint's files, in '{file}'")
    return found
