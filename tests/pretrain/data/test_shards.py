"""Shards that are not what they were: each is one sentence that names the file and the place."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from pretrain.common.errors import UserError
from pretrain.data.shards import Shard, TokenStream


def made(folder, documents, dtype=np.uint16, name="train-x-00000"):
    folder.mkdir(exist_ok=True)
    builder = IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype), [len(document)])
    builder.finalize(str(folder / f"{name}.idx"))
    return folder / name


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_any_slice_of_several_shards_is_that_of_their_text(tmp_path, dtype):
    rng = np.random.default_rng(0)
    parts = [[rng.integers(0, 50, n) for n in sizes] for sizes in ((3, 9), (1,), (20, 5, 2))]
    shards = [Shard(made(tmp_path, p, dtype, str(i)), 50) for i, p in enumerate(parts)]
    stream, text = TokenStream(shards), np.concatenate([d for p in parts for d in p])
    assert stream.document_lengths().tolist() == [3, 9, 1, 20, 5, 2]
    for start in range(len(text)):
        for end in range(start + 1, len(text) + 1):
            found = stream.read(start, end - start)
            assert found.dtype == np.int64 and np.array_equal(found, text[start:end])
    empty = TokenStream([])
    assert (len(empty), empty.document_lengths().tolist()) == (0, [])


@pytest.mark.parametrize(("dtype", "bad"), [(np.uint16, 50), (np.int32, 70_000), (np.int32, -1)])
def test_an_id_outside_the_vocabulary_is_named_with_its_place(tmp_path, dtype, bad):
    text = np.arange(50)
    text[37] = bad
    shard = Shard(made(tmp_path, [text], dtype), 50)
    assert shard.read(0, 37).tolist() == list(range(37))
    for start, count in ((0, 50), (37, 1), (30, 9)):
        words = f"train-x-00000.bin: token 37 is {bad}, expected an id from 0 to 49"
        with pytest.raises(UserError, match=words):
            shard.read(start, count)


def test_a_file_that_is_cut_while_it_is_read(tmp_path):
    prefix = made(tmp_path, [np.arange(40)])
    shard = Shard(prefix, 50)
    assert shard.read(20, 20).tolist() == list(range(20, 40))
    with prefix.with_name(f"{prefix.name}.bin").open("r+b") as file:
        file.truncate(60)
    assert shard.read(0, 30).tolist() == list(range(30)), "what is left can be read"
    for start, count in ((0, 40), (29, 2), (35, 3)):
        with pytest.raises(UserError, match=r"was cut short .* it has 60 bytes, expected 80;"):
            shard.read(start, count)


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        ("idx", lambda b: b"no" + b[2:], r"train-x-00000.idx is no index of a shard \(bad header"),
        ("idx", lambda b: b[:40], "train-x-00000.idx is no index of a shard"),
        ("idx", lambda b: b[:34] + b"\x09" + b[35:], "has 80 bytes, but train-x-00000.idx says 9 "),
        ("bin", lambda b: b[:-2], "has 78 bytes, but train-x-00000.idx says 40 tokens of 2 bytes"),
        ("bin", None, "cannot read .*train-x-00000.bin: No such file"),
        ("idx", None, "train-x-00000.idx is no index of a shard .*No such file"),
    ],
)
def test_files_that_do_not_fit_together(tmp_path, suffix, change, words):
    prefix = made(tmp_path, [np.arange(40)])
    path = prefix.with_name(f"{prefix.name}.{suffix}")
    if change is None:
        path.unlink()
    else:
        path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=words):
        Shard(prefix, 50)


def test_it_reads_what_megatron_reads(corpus, tmp_path):
    (path,) = shutil.copytree(corpus, tmp_path / "data").glob("valid-*.bin")
    prefix = path.with_suffix("")
    theirs, shard = IndexedDataset(str(prefix)), Shard(prefix, 300)
    lengths = shard.document_lengths()
    for i, start in enumerate(np.cumsum(lengths) - lengths):
        assert np.array_equal(shard.read(int(start), int(lengths[i])), theirs[i])
