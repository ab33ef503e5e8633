"""Time turning documents into shards, against a bare SentencePiece loop over the same documents.

    python -m benchmarks.tokenization_speed [--megabytes 60] [--rounds 3]

The bare loop is `for text in documents: model.encode(text)` in one process, keeping nothing. The
pipeline is `python -m data_prep` from reading files to hashed shards on disk, without its start-up
(imports and worker processes): it is timed from the first document read to the last complete shard.
Rounds alternate and the median counts, because other work on the machine disturbs single figures.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import sentencepiece

from data_prep.config import SourceConfig, TokenizerConfig
from data_prep.progress import Progress
from data_prep.screen import ProgressDisplay
from data_prep.shards import indexed_dataset, write_shards
from data_prep.source_kinds.stdlib import StandardLibrary
from data_prep.sources import open_source
from data_prep.tokenizer_training import train_sentencepiece
from data_prep.workers import WorkerPool
from pretrain.data.tokenizer import Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=60, help="text for each measurement (60)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kind", choices=("bpe", "unigram"), default="bpe")
    parser.add_argument("--vocab-size", type=int, default=4096)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    source = StandardLibrary(SourceConfig(name="stdlib", kind="stdlib"))
    texts = [d.content.decode() for f in range(source.file_count) for d in source.read(f)]
    config = TokenizerConfig(kind=options.kind, vocab_size=options.vocab_size)
    model_file = folder / "tokenizer.model"
    model_file.write_bytes(train_sentencepiece(texts, config))
    copies = max(1, round(options.megabytes * 1e6 / sum(source.sizes)))
    for copy in range(copies):
        for index, text in enumerate(texts):
            path = folder / "text" / str(copy) / f"{index:04d}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    megabytes = copies * sum(len(text.encode()) for text in texts) / 1e6
    indexed_dataset()  # its import is no part of the speed

    times: dict[str, list[tuple[float, float]]] = {}
    for round_ in range(options.rounds):
        times.setdefault("bare SentencePiece loop", []).append(bare(model_file, texts * copies))
        for processes in (1, 2):
            output = folder / f"out-{round_}-{processes}"
            times.setdefault(f"data_prep, processes={processes}", []).append(
                pipeline(folder / "text", model_file, output, processes)
            )
    report(times, megabytes, options)


def bare(model_file: Path, texts: list[str]) -> tuple[float, float]:
    """Return the wall and CPU seconds of encoding alone."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    wall, cpu = time.perf_counter(), time.process_time()
    for text in texts:
        model.encode(text)
    return time.perf_counter() - wall, time.process_time() - cpu


def pipeline(text: Path, model_file: Path, output: Path, processes: int) -> tuple[float, float]:
    """Return the wall seconds, and the CPU seconds of the parent and all workers together."""
    (output / ".partial").mkdir(parents=True)
    progress = Progress({}, {}, path=str(output / ".partial" / "progress.json"))
    source = open_source(SourceConfig(name="text", kind="files", paths=[str(text)]))
    with ProgressDisplay() as display:
        children = cpu_of_children()
        with WorkerPool(processes) as pool:
            for future in [pool.submit(time.sleep, 1.0) for _ in range(processes)]:
                pool.result(future)  # all have started
            wall, cpu = time.perf_counter(), time.process_time()
            write_shards(
                [source],
                Tokenizer.load(model_file),
                progress,
                output,
                pool,
                shard_bytes=20_000_000,
                validation_fraction=0.05,
                display=display,
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return wall, cpu + cpu_of_children() - children


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def report(
    times: dict[str, list[tuple[float, float]]], megabytes: float, options: argparse.Namespace
) -> None:
    print(
        f"{megabytes:.0f} MB of the standard library, {options.kind} {options.vocab_size}, "
        f"median of {options.rounds} rounds, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"sentencepiece {sentencepiece.__version__}"
    )
    print(f"{'':28} {'wall s':>8} {'MB/s':>7} {'CPU s':>8} {'MB per CPU s':>13} {'ratio':>7}")
    bare_wall = statistics.median(wall for wall, _ in times["bare SentencePiece loop"])
    bare_cpu = statistics.median(cpu for _, cpu in times["bare SentencePiece loop"])
    for name, pairs in times.items():
        wall = statistics.median(wall for wall, _ in pairs)
        cpu = statistics.median(cpu for _, cpu in pairs)
        print(
            f"{name:28} {wall:8.2f} {megabytes / wall:7.2f} {cpu:8.2f} {megabytes / cpu:13.2f} "
            f"{bare_cpu / cpu:7.2f}   (wall: {bare_wall / wall:.2f})"
        )
    print("ratio: MB per CPU second of parent and workers, to that of the bare loop")


if __name__ == "__main__":
    main()
