import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data_prep import shards
from data_prep.config import DataPrepConfig, TokenizerConfig
from data_prep.prepare import prepare
from data_prep.tokenizer_training import is_validation
from pretrain.common.config_loader import build_config
from pretrain.common.errors import UserError
from pretrain.data.manifest import Manifest
from pretrain.data.tokenizer import Tokenizer
from tests.helpers.data_preparation import (
    command,
    digests,
    files_config,
    run_command,
    wait_until_gone,
    write_config,
)


def documents_of(directory, split):
    """Texts of a split, decoded from its shards through megatron-core."""
    manifest = Manifest.load(directory)
    tokenizer = Tokenizer.load(directory)
    texts = []
    for shard in manifest.shards:
        if shard.split == split:
            dataset = shards.indexed_dataset().IndexedDataset(str(directory / shard.name))
            assert len(dataset) == len(dataset.document_indices) - 1 == shard.documents
            for index in range(len(dataset)):
                tokens = dataset[index]
                assert tokens.dtype == tokenizer.dtype
                assert tokens[-1] == tokenizer.eod_id
                texts.append(tokenizer.decode(tokens))
    return texts


def test_shards_hold_every_document_once_and_in_order(small_data, text_folder):
    texts = [path.read_bytes().decode() for path in sorted(text_folder.iterdir())]
    valid = [text for text in texts if is_validation(text.encode(), 0.1)]
    assert valid
    assert documents_of(small_data, "valid") == valid
    assert documents_of(small_data, "train") == [text for text in texts if text not in valid]


def test_the_manifest_adds_up(small_data, text_folder):
    manifest = Manifest.load(small_data)
    texts = [path.read_bytes() for path in text_folder.iterdir()]
    (source,) = manifest.sources
    assert (source.documents, source.bytes) == (60, sum(map(len, texts)))
    for split in ("train", "valid"):
        listed = [shard for shard in manifest.shards if shard.split == split]
        counts = source.splits[split]
        assert counts == manifest.counts(split)
        assert sum(shard.documents for shard in listed) == counts.documents
        assert sum(shard.bytes for shard in listed) == counts.bytes
        assert sum(shard.tokens for shard in listed) == counts.tokens
        assert sum(shard.size["bin"] for shard in listed) == 2 * counts.tokens
    expected = {f"{shard.name}.{suffix}" for shard in manifest.shards for suffix in ("bin", "idx")}
    found = {path.name for path in small_data.iterdir()}
    assert found == expected | {"manifest.json", "tokenizer.model"}


def test_shards_end_soon_after_their_size(tmp_path, text_folder, model_file, monkeypatch):
    monkeypatch.setattr(shards, "BATCH_BYTES", 5_000)
    manifest = prepare(files_config(tmp_path / "out", [text_folder], model_file))
    indices = sorted({shard.name[-5:] for shard in manifest.shards})
    sizes = [sum(s.bytes for s in manifest.shards if s.name.endswith(i)) for i in indices]
    largest = max(path.stat().st_size for path in text_folder.iterdir())
    assert len(sizes) > 3
    assert all(100_000 <= size < 105_000 + largest for size in sizes[:-1])


def test_entropies_are_those_of_the_text(small_data, text_folder):
    documents = [np.frombuffer(path.read_bytes(), np.uint8) for path in text_folder.iterdir()]
    counts = np.zeros((256, 256))
    for document in documents:
        np.add.at(counts, (document[:-1], document[1:]), 1)
    joint = counts / counts.sum()
    given_first = joint / np.maximum(joint.sum(1, keepdims=True), 1e-300)
    conditional = -(joint[joint > 0] * np.log2(given_first[joint > 0])).sum()
    share = np.bincount(np.concatenate(documents), minlength=256) / sum(map(len, documents))
    unigram = -(share[share > 0] * np.log2(share[share > 0])).sum()
    entropy = Manifest.load(small_data).byte_entropy
    assert entropy.unigram == pytest.approx(unigram)
    assert entropy.bigram == pytest.approx(conditional)


def test_the_number_of_processes_changes_nothing(tmp_path, small_data, text_folder, model_file):
    prepare(files_config(tmp_path / "two", [text_folder], model_file, processes=2))
    assert digests(tmp_path / "two") == digests(small_data)
    first, second = Manifest.load(small_data), Manifest.load(tmp_path / "two")
    first.created = second.created
    assert first == second


def test_an_unchanged_rerun_does_nothing_and_says_so(
    tmp_path, small_data, text_folder, model_file, capsys
):
    output = shutil.copytree(small_data, tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    prepare(files_config(output, [text_folder], model_file, processes=2))
    assert "complete and unchanged: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_a_damaged_data_set_is_not_called_complete(tmp_path, small_data, text_folder, model_file):
    output = shutil.copytree(small_data, tmp_path / "copy")
    (output / "train-text-00001.bin").write_bytes(b"short")
    with pytest.raises(UserError, match=r"train-text-00001.bin has 5 bytes"):
        prepare(files_config(output, [text_folder], model_file))


def test_other_settings_or_sources_need_overwrite(tmp_path, small_data, text_folder, model_file):
    output = shutil.copytree(small_data, tmp_path / "copy")
    before = digests(output)
    other = files_config(output, [text_folder], model_file, shard_bytes=300_000)
    with pytest.raises(UserError, match=r"shard_bytes was 100000, now is 300000.*--overwrite"):
        prepare(other)
    grown = shutil.copytree(text_folder, tmp_path / "grown")
    config = files_config(output, [grown], model_file)
    with pytest.raises(UserError, match=r"sources.0.paths.0 was"):
        prepare(config)
    assert digests(output) == before
    prepare(other, overwrite=True)
    assert len(Manifest.load(output).shards) < len(Manifest.load(small_data).shards)
    assert not (output / "train-text-00004.bin").exists()


def test_a_changed_file_is_noticed(tmp_path, model_file):
    (tmp_path / "a.txt").write_text("text")
    config = files_config(tmp_path / "out", [tmp_path / "a.txt"], model_file)
    prepare(config)
    (tmp_path / "a.txt").write_text("other text")
    with pytest.raises(UserError, match=r"source 'text' has changed since .*--overwrite"):
        prepare(config)


def test_shards_of_unknown_origin_are_not_touched(tmp_path, text_folder, model_file):
    (tmp_path / "out").mkdir()
    theirs = tmp_path / "out" / "train-theirs-00000.bin"
    theirs.write_text("precious")
    with pytest.raises(UserError, match="shards of unknown origin"):
        prepare(files_config(tmp_path / "out", [text_folder], model_file))
    assert theirs.read_text() == "precious"


def test_sources_keep_their_own_shards_and_their_limits(tmp_path, text_folder, model_file):
    rows = "".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(100))
    (tmp_path / "rows.jsonl").write_text(rows)
    sources = [
        {
            "name": "text",
            "kind": "files",
            "paths": [str(text_folder)],
            "weight": 3,
            "max_documents": 7,
        },
        {
            "name": "rows-2",
            "kind": "files",
            "paths": [str(tmp_path / "rows.jsonl")],
            "text_field": "body",
            "max_documents": 50,
        },
    ]
    manifest = prepare(files_config(tmp_path / "out", [], model_file, sources=sources))
    assert [(s.name, s.weight, s.documents) for s in manifest.sources] == [
        ("text", 3.0, 7),
        ("rows-2", 1.0, 50),
    ]
    assert {shard.source for shard in manifest.shards} == {"text", "rows-2"}


def test_skipped_documents_are_counted_and_shown(tmp_path, model_file, capsys):
    text = tmp_path / "text"
    text.mkdir()
    (text / "a.jsonl").write_bytes(b'{"text": "\xff"}\n{"text": "fine"}\n\n{"text": ""}\n')
    (text / "b.txt").write_bytes(b"\xff\xfe")
    manifest = prepare(files_config(tmp_path / "out", [text], model_file))
    (source,) = manifest.sources
    assert source.skipped == {"undecodable": 2, "empty": 2}
    assert source.documents == 1
    shown = capsys.readouterr().out
    assert "skipped in text: 2 undecodable, 2 empty" in shown
    if not manifest.counts("valid").documents:
        assert "warning: no document fell into the validation split" in shown


def test_a_source_without_text_is_refused_and_nothing_is_written(tmp_path, model_file):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ""}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match="source 'text' holds no text"):
        prepare(files_config(tmp_path / "out", [tmp_path / "a.jsonl"], model_file))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_cannot_be_trained_leaves_nothing(tmp_path, text_folder):
    config = files_config(tmp_path / "out", [text_folder], "unused")
    config.tokenizer = TokenizerConfig(vocab_size=60_000)
    with pytest.raises(UserError, match="vocab_size is 60000"):
        prepare(config)
    assert not (tmp_path / "out").exists()


def test_whole_shards_survive_a_broken_file_and_the_run_resumes(
    tmp_path, small_data, text_folder, model_file, monkeypatch
):
    finish = shards.ShardWriter.finish

    def fail_at_third(writer):
        if writer.index == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return finish(writer)

    config = files_config(tmp_path / "out", [text_folder], model_file)
    monkeypatch.setattr(shards.ShardWriter, "finish", fail_at_third)
    with pytest.raises(UserError, match=r"the disk that holds .*out is full"):
        prepare(config)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "train-text-00001.bin" in names
    assert not {"train-text-00002.bin", "manifest.json"} & names
    with pytest.raises(UserError, match=r"holds no manifest.json: run python -m data_prep"):
        Manifest.load(tmp_path / "out")
    monkeypatch.setattr(shards.ShardWriter, "finish", finish)
    changed = files_config(tmp_path / "out", [text_folder], model_file, validation_fraction=0.2)
    with pytest.raises(UserError, match=r"validation_fraction was 0.1"):
        prepare(changed)
    # As if killed between a shard's renaming and its listing.
    (tmp_path / "out" / "train-text-00002.bin").write_bytes(b"unlisted")
    (tmp_path / "out" / "train-text-00099.idx").write_bytes(b"unlisted")
    prepare(config)
    assert digests(tmp_path / "out") == digests(small_data)
    assert Manifest.load(tmp_path / "out").sources == Manifest.load(small_data).sources
    assert Manifest.load(tmp_path / "out").byte_entropy == Manifest.load(small_data).byte_entropy


def test_two_runs_do_not_write_to_one_place(tmp_path, text_folder, model_file):
    import fcntl

    (tmp_path / "out" / ".partial").mkdir(parents=True)
    with (tmp_path / "out" / ".partial" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is writing to"):
            prepare(files_config(tmp_path / "out", [text_folder], model_file))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_names_the_disk_keeps_whole_shards_and_resumes(
    tmp_path, small_data, text_folder, model_file
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=350k", "tmpfs", str(disk)], check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        config = files_config(disk / "out", [text_folder], model_file)
        with pytest.raises(UserError, match=rf"the disk that holds {disk}/out is full"):
            prepare(config)
        kept = {path.name: path.read_bytes() for path in (disk / "out").glob("*-text-*")}
        assert kept
        assert kept.items() <= digests(small_data).items()
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        prepare(config)
        assert digests(disk / "out") == digests(small_data)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def slow_run(tmp_path, text_folder, model_file):
    """A config file of a run that takes a few seconds, and where its output goes."""
    folder = tmp_path / "text_folder"
    folder.mkdir()
    text = b"".join(path.read_bytes() for path in sorted(text_folder.iterdir()))
    for index in range(24):
        (folder / f"{index:02d}.txt").write_bytes(str(index).encode() + text)
    config = write_config(
        tmp_path / "slow.yaml",
        output=str(tmp_path / "out"),
        sources=[{"name": "text", "kind": "files", "paths": [str(folder)]}],
        tokenizer={"path": str(model_file)},
        shard_bytes=300_000,
        processes=2,
    )
    return config, tmp_path / "out"


def wait_for_shards(process, output, count=3):
    limit = time.monotonic() + 60
    while len(list(output.glob("train-*.idx"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_at_any_instant_it_resumes_to_the_same_shards(slow_run, tmp_path):
    config, output = slow_run
    for count in (1, 6):
        process = command(config)
        wait_for_shards(process, output, count)
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        process.kill()
        process.wait()
        assert len(children) >= 2
        wait_until_gone(children)
        process.communicate()
        assert not (output / "manifest.json").exists()
    resumed = run_command(config)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming after" in resumed.stderr
    whole = run_command(config, f"output={tmp_path / 'whole'}")
    assert whole.returncode == 0, whole.stderr
    assert digests(output) == digests(tmp_path / "whole")
    first, second = Manifest.load(output), Manifest.load(tmp_path / "whole")
    first.created = second.created
    assert first == second


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_it_with_one_sentence(slow_run, number, status):
    config, output = slow_run
    process = command(config, start_new_session=True)
    wait_for_shards(process, output)
    children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == status
    assert stderr.splitlines()[-1].startswith("interrupted: complete shards are kept, run the same")
    assert "Traceback" not in stderr
    wait_until_gone(children)


@pytest.mark.slow
def test_a_document_of_50_megabytes_takes_bounded_memory(tmp_path, model_file):
    line = "    a line of text, é, as long as lines usually are\n"
    (tmp_path / "big.txt").write_text(line * (50_000_000 // len(line.encode())))
    (tmp_path / "line.txt").write_text("x y " * 500_000)
    config = write_config(
        tmp_path / "big.yaml",
        output=str(tmp_path / "out"),
        sources=[{"name": "big", "kind": "files", "paths": [str(tmp_path / "*.txt")]}],
        tokenizer={"path": str(model_file)},
        validation_fraction=0,
        processes=1,
    )
    process = command(config)
    peak = 0
    while process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            try:
                peak = max(peak, child.memory_info().rss)
            except psutil.NoSuchProcess:
                continue
        time.sleep(0.05)
    assert process.returncode == 0, process.communicate()
    process.communicate()
    assert peak < 2e9
    texts = documents_of(tmp_path / "out", "train")
    assert texts == [(tmp_path / name).read_text() for name in ("big.txt", "line.txt")]


def test_huggingface_sources_go_the_same_way(tmp_path, model_file, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = [f"row {i}\n" for i in range(200)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "a.parquet")
    source = {
        "kind": "huggingface",
        "dataset": "parquet",
        "data_files": [str(tmp_path / "a.parquet")],
    }
    values = {
        "output": str(tmp_path / "out"),
        "sources": [{"name": "a", **source}, {"name": "b", **source, "streaming": True}],
        "tokenizer": {"vocab_size": 275},
        "validation_fraction": 0,
    }
    config = build_config(DataPrepConfig, values, "test")
    prepare(config)
    assert documents_of(Path(config.output), "train") == texts * 2


@pytest.mark.parametrize("marker", ["metrics.jsonl", "launch.yaml"])
@pytest.mark.parametrize("below", ["", "data/new"])
def test_an_output_in_a_run_is_refused(tmp_path, marker, below):
    run, text = tmp_path / "run", tmp_path / "text"
    for folder in (run, text):
        folder.mkdir()
    (run / marker).write_text("")
    (text / "a.txt").write_text("words " * 100)
    config = files_config(run / below, [text], "none.model")
    with pytest.raises(UserError, match=f"which is in the directory of a run, {run}; expected"):
        prepare(config)
    assert [p.name for p in run.iterdir()] == [marker]


def test_an_output_among_its_own_text_is_refused(tmp_path):
    text = tmp_path / "text"
    (text / "deep").mkdir(parents=True)
    (text / "a.txt").write_text("words " * 100)
    for output in (text, text / "deep" / "data", text / "deep" / ".." / "data"):
        with pytest.raises(
            UserError, match="where source 'text' reads its text; expected a folder"
        ):
            prepare(files_config(output, [text], "none.model"))
    assert sorted(p.name for p in text.iterdir()) == ["a.txt", "deep"]
