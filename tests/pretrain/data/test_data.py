"""Batches as a function of (seed, step); blends; packing at document boundaries."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import IndexedDataset

from data_prep.config import DataPrepConfig
from data_prep.prepare import prepare
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.config import DataConfig, DataSource, RunConfig, TrainConfig
from pretrain.data.batches import TrainingBatches, open_data, pack_rows
from pretrain.data.manifest import Manifest
from pretrain.data.order import blend, permute
from pretrain.training.phases import open_phases

CONFIG = TrainConfig(steps=1, seq_len=16, global_batch_tokens=64)


@given(st.integers(1, 300), st.binary(min_size=1, max_size=8))
def test_permutation_is_one(count, key):
    assert sorted(permute(i, count, key) for i in range(count)) == list(range(count))


def test_permutation_looks_random_and_depends_on_the_key():
    a, b = ([permute(i, 1000, key) for i in range(1000)] for key in (b"a", b"b"))
    assert a != b
    assert abs(np.corrcoef(a, range(1000))[0, 1]) < 0.1
    assert np.mean(np.abs(np.diff(a))) == pytest.approx(333, rel=0.1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 400))
def test_blends_are_exact_over_time(shares, count):
    total = sum(shares)
    weights = [Fraction(s, total) for s in shares]
    seen: Counter[int] = Counter()
    for index in range(count):
        source, position = blend(index, weights)
        assert position == seen[source]  # each source's samples in order, none skipped
        seen[source] += 1
    for source, weight in enumerate(weights):
        assert abs(seen[source] - weight * count) <= len(weights)


def tokens_of(batches):
    return torch.cat([b.tokens for b in batches], 1)


def test_batches_depend_on_seed_and_step_alone(corpus):
    data = open_data(DataConfig(path=str(corpus)))
    one, again = (TrainingBatches(data, CONFIG, 2, 5) for _ in range(2))
    later = tokens_of(one.micro_batches(7))
    for step in range(9):
        assert torch.equal(tokens_of(one.micro_batches(step)), tokens_of(again.micro_batches(step)))
    assert torch.equal(tokens_of(one.micro_batches(7)), later)
    assert not torch.equal(tokens_of(TrainingBatches(data, CONFIG, 2, 6).micro_batches(7)), later)


def test_batches_do_not_depend_on_where_the_data_lies(corpus, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    here, there = (
        TrainingBatches(open_data(DataConfig(path=str(p))), CONFIG, 2, 0) for p in (corpus, moved)
    )
    assert torch.equal(tokens_of(here.micro_batches(2)), tokens_of(there.micro_batches(2)))


@pytest.mark.parametrize("size", [1, 2])
def test_batches_do_not_depend_on_the_number_of_processes(corpus, size):
    data = open_data(DataConfig(path=str(corpus)))
    whole = TrainingBatches(data, CONFIG, 2, 0).micro_batches(3)
    parts = [TrainingBatches(data, CONFIG, 2, 0).micro_batches(3, r, size) for r in range(size)]
    merged = [b for group in zip(*parts, strict=True) for b in group]
    assert torch.equal(tokens_of(merged), tokens_of(whole))


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order(corpus):
    data = open_data(DataConfig(path=str(corpus)))
    batches = TrainingBatches(data, CONFIG, 2, 0)
    count = batches.samples[0]
    first = [batches.locate(i)[1] for i in range(count)]
    second = [batches.locate(i)[1] for i in range(count, 2 * count)]
    assert sorted(first) == sorted(second) == list(range(count))
    assert first != second


def test_the_stream_is_the_shards_documents(corpus):
    """Across shard boundaries too, and each document ends with the end-of-document id."""
    data = open_data(DataConfig(path=str(corpus)))
    manifest = Manifest.load(corpus)
    names = [s.name for s in manifest.shards if s.split == "train"]
    shards = [IndexedDataset(str(corpus / name)) for name in names]
    documents = [shard[i] for shard in shards for i in range(len(shard))]
    assert all(d[-1] == data.tokenizer.eod_id for d in documents)
    stream = np.concatenate(documents)
    assert np.array_equal(data.train[0].read(0, len(data.train[0])), stream)
    assert np.array_equal(data.train[0].read(33, 50), stream[33:83])
    assert data.train[0].document_lengths().tolist() == [len(d) for d in documents]


def test_documents_open_sequences():
    rows = np.array([[5, 7, 3, 7, 7], [7, 2, 4, 7, 9]])
    batch = pack_rows(rows, eod_id=7)
    assert batch.tokens.tolist() == [[5, 7, 3, 7, 7, 2, 4, 7]]
    assert batch.targets.tolist() == [[7, 3, 7, 7, 2, 4, 7, 9]]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 4, 7, 8]


def test_data_that_does_not_fit_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"holds no manifest.json: run python -m data_prep"):
        open_data(DataConfig(path=str(tmp_path)))
    data = open_data(DataConfig(path=str(corpus)))
    with pytest.raises(UserError, match=r"fewer than one sample of train.seq_len \+ 1"):
        TrainingBatches(data, replace(CONFIG, seq_len=10**6), 2, 0)


def test_a_changed_tokenizer_or_shard_is_refused(corpus, tmp_path):
    copy = tmp_path / "data"
    shutil.copytree(corpus, copy)
    shard = next(copy.glob("train-*.bin"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"train-code-00000.bin has \d+ bytes, expected \d+"):
        open_data(DataConfig(path=str(copy)))
    shutil.rmtree(copy)
    shutil.copytree(corpus, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["tokenizer"]["sha256"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not the tokenizer that made the shards"):
        open_data(DataConfig(path=str(copy)))


def test_a_blend_of_directories(corpus, other_corpus):
    blended = DataConfig(blend=[DataSource(str(corpus), 3.0), DataSource(str(other_corpus), 1.0)])
    data = open_data(blended)
    batches = TrainingBatches(data, CONFIG, 2, 0)
    sources = Counter(batches.locate(i)[0] for i in range(100))
    assert sources == {0: 75, 1: 25}
    assert data.labels == data.sources, "both are named code"
    assert open_data(DataConfig(str(corpus))).labels == ["code"]


@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (1, 5, 2)])
def test_the_same_text_named_twice_is_gone_through_once(corpus, other_corpus, tmp_path, weights):
    """By the same path or as a copy: no sample comes back before all have been seen."""
    copy = shutil.copytree(corpus, tmp_path / "copy")
    paths = [corpus, copy, corpus][: len(weights)]
    named = [DataSource(str(p), float(w)) for p, w in zip(paths, weights, strict=True)]
    once = TrainingBatches(open_data(DataConfig(str(corpus))), CONFIG, 2, 0)
    alone = TrainingBatches(open_data(DataConfig(blend=named)), CONFIG, 2, 0)
    assert [alone.locate(i) for i in range(500)] == [once.locate(i) for i in range(500)]
    others = DataSource(str(other_corpus), float(sum(weights)))
    data = open_data(DataConfig(blend=[named[0], others, *named[1:]]))
    batches = TrainingBatches(data, CONFIG, 2, 0)
    assert [float(w) for w in batches.order.mixes[0].weights] == [0.5, 0.5]
    count = once.samples[0]
    seen = [n for s, n in map(batches.locate, range(2 * count)) if s == 0]
    assert len(seen) == len(set(seen)) == count
    assert batches.epochs(2 * count // 4)[0] == pytest.approx(1, abs=4 / count)
    assert data.identity != open_data(DataConfig(blend=[named[0], others])).identity


def two_sources(folder, tokenizer, names=("one", "two")):
    """A prepared directory of the sources ``one`` and ``two``, with weights 1 and 3."""
    for name in names:
        (folder / f"{name}.txt").write_text(f"{name} and some more words\n" * 200)
    sources = [
        {"name": name, "kind": "files", "paths": [str(folder / f"{name}.txt")], "weight": weight}
        for name, weight in (("one", 1.0), ("two", 3.0))
        if name in names
    ]
    values = {
        "output": str(folder / "data"),
        "sources": sources,
        "tokenizer": {"path": str(tokenizer)},
        "validation_fraction": 0,
        "processes": 1,
    }
    prepare(build_config(DataPrepConfig, values, "test"))
    return folder / "data"


def test_a_source_prepared_beside_others_elsewhere_is_the_same_source(corpus, tmp_path):
    """In one blend, and in a later phase of a run."""
    both = two_sources(tmp_path, corpus)
    (tmp_path / "apart").mkdir()
    alone = two_sources(tmp_path / "apart", corpus, ["two"])
    data = open_data(DataConfig(blend=[DataSource(str(both), 1.0), DataSource(str(alone), 1.0)]))
    assert data.sources == open_data(DataConfig(str(both))).sources
    assert data.weights == [0.25, 1.75]
    config = build_config(
        RunConfig,
        {
            "name": "x",
            "model": {"hidden_size": 8, "pattern": "attn"},
            "data": {"path": str(both)},
            "train": {"tokens": 512, "seq_len": 8, "global_batch_tokens": 64},
            "parallel": {"micro_batch_size": 1},
            "phases": [{"until": 0.5}, {"data": {"path": str(alone)}}],
        },
        "x",
    )
    first, second = open_phases(config.plan, config.data, open_data(config.data))
    assert second.sources == first.sources[1:] != open_data(DataConfig(str(alone))).sources


def shares(config, count=400):
    batches = TrainingBatches(open_data(config), CONFIG, 2, 0)
    found = Counter(batches.locate(i)[0] for i in range(count))
    names = [name.split("@")[0] for name in batches.names]
    return {name: found[i] / count for i, name in enumerate(names)}


def test_a_run_weighs_the_sources_of_its_data(tmp_path, corpus):
    data = str(two_sources(tmp_path, corpus))
    assert shares(DataConfig(path=data)) == {"one": 0.25, "two": 0.75}
    assert shares(DataConfig(path=data, weights={"one": 3})) == {"one": 0.5, "two": 0.5}
    assert shares(DataConfig(path=data, weights={"one": 7, "two": 1})) == {
        "one": 0.875,
        "two": 0.125,
    }
    assert shares(DataConfig(path=data, weights={"two": 0})) == {"one": 1.0}
    again = shutil.copytree(corpus, tmp_path / "again")
    weighed = DataSource(data, 1.0, {"one": 0})
    assert shares(DataConfig(blend=[DataSource(str(again), 3.0), weighed])) == {
        "code": 0.75,
        "two": 0.25,
    }
    with pytest.raises(UserError, match=r"name 'three', which is no source of .*it has one, two"):
        open_data(DataConfig(path=data, weights={"three": 1}))
    with pytest.raises(UserError, match="leave out every source"):
        open_data(DataConfig(path=data, weights={"one": 0, "two": 0}))


@pytest.mark.parametrize(("weight", "words"), [(-1, "at least 0"), (float("inf"), "a finite")])
def test_weights_out_of_range_are_refused(weight, words):
    with pytest.raises(UserError, match=words):
        DataConfig(path="data", weights={"one": weight})
