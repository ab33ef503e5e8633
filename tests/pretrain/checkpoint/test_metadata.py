"""A checkpoint's table is read as data: what names anything else is refused, and does not run."""

from __future__ import annotations

import collections
import os
import pickle
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from pretrain.checkpoint.metadata import read_metadata
from pretrain.checkpoint.sharded_state import Boxes, StorageError
from pretrain.checkpoint.storage import load_state, save_state
from pretrain.common.errors import UserError

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
EARLIER = Path(__file__).parents[2] / "data/run-v1/runs/small/checkpoints/step-00000008"


class Calls:
    """Pickled as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def state(dtype: torch.dtype) -> dict[str, Boxes]:
    return {
        "a": Boxes((4, 3), [((0, 0), torch.arange(12).view(4, 3).to(dtype))]),
        "scalar": Boxes((), [((), torch.tensor(3).to(dtype))]),
    }


@pytest.fixture
def saved(processes, tmp_path):
    save_state(state(torch.float32), tmp_path, None)
    return tmp_path


@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_of_ours_are_read(processes, tmp_path, dtype):
    save_state(state(dtype), tmp_path, None)
    assert set(read_metadata(tmp_path).state_dict_metadata) == {"a", "scalar"}
    found = {
        name: Boxes(b.full_shape, [(o, torch.zeros_like(t)) for o, t in b.parts.items()])
        for name, b in state(dtype).items()
    }
    load_state(found, tmp_path)
    for name, boxes in state(dtype).items():
        for offsets, tensor in boxes.parts.items():
            assert torch.equal(found[name].parts[offsets], tensor)


def test_tables_of_earlier_versions_are_read():
    assert "embedding.weight" in read_metadata(EARLIER).state_dict_metadata


def test_a_path_as_later_versions_of_python_write_it_is_read(saved):
    path = saved / ".metadata"
    content = path.read_bytes()
    assert content.count(b"\x8c\x07pathlib\x94") == 1
    renamed = content.replace(b"\x8c\x07pathlib\x94", b"\x8c\x0epathlib._local\x94")
    length = int.from_bytes(content[3:11], "little") + len("._local")  # of the pickle's frame
    path.write_bytes(renamed[:3] + length.to_bytes(8, "little") + renamed[11:])
    read_metadata(saved)


@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, subprocess.call, getattr, __import__, open, torch.load, print, map],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_what_calls_a_function_is_refused_and_does_not_run(saved, function, protocol):
    mark = saved / "ran"
    call = Calls(function, f"touch {mark}")
    for hidden in (
        call,
        Metadata({}, storage_data={}, planner_data=call),
        Metadata({}, storage_data={}, version=call),  # type: ignore[arg-type]
    ):
        (saved / ".metadata").write_bytes(pickle.dumps(hidden, protocol))
        with pytest.raises(UserError, match=r"\.metadata is not the table .*it names"):
            read_metadata(saved)
    assert not mark.exists()


def test_what_is_no_tensor_in_the_folder_is_refused(saved):
    good = read_metadata(saved)
    good.storage_meta = None
    cases: list[tuple[Any, str]] = [
        (collections.OrderedDict(), "it names collections.OrderedDict"),
        ({}, "it holds something else"),
        (Metadata({}), "it holds something else"),
        (Metadata({"a": BytesStorageMetadata()}, storage_data={}), "BytesStorageMetadata"),
        (Metadata({"a": 3}, storage_data={}), "a is no tensor"),  # type: ignore[dict-item]
        (Metadata(good.state_dict_metadata, storage_data={"a": 3}), "relative_path"),
    ]
    for found, words in cases:
        (saved / ".metadata").write_bytes(pickle.dumps(found))
        with pytest.raises(UserError, match=words):
            load_state(state(torch.float32), saved)
    for outside in ("../x", "/etc/passwd", "a/b", "..", ""):
        for place in good.storage_data.values():
            place.relative_path = outside
        (saved / ".metadata").write_bytes(pickle.dumps(good))
        with pytest.raises(UserError, match="lies outside of the checkpoint's files"):
            load_state(state(torch.float32), saved)


def test_damage_is_one_sentence(saved):
    path = saved / ".metadata"
    content = path.read_bytes()
    for damaged in (
        b"",
        content[:50],
        content[:-1],
        b"\x00" * 100,
        b"cposix\nsystem\n.",
        b"\x80\x04P.",
    ):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="not the table of a checkpoint's tensors") as error:
            load_state(state(torch.float32), saved)
        assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_state(state(torch.float32), saved)


def test_what_is_missing_is_said_as_before(saved):
    with pytest.raises(StorageError, match="other"):
        load_state({"other": Boxes((1,), [((0,), torch.zeros(1))])}, saved)
