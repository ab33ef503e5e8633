"""From a config to a finished data set: start, resume, or find that there is nothing to do."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.config import DataPrepConfig
from data_prep.documents import Source
from data_prep.progress import NAME as PROGRESS
from data_prep.progress import Progress, shard_files
from data_prep.screen import ProgressDisplay, print_summary
from data_prep.shards import file_hash, indexed_dataset, write_shards
from data_prep.sources import open_source
from data_prep.tokenizer_training import train_tokenizer
from data_prep.watched_files import WatchedFiles
from data_prep.workers import SPLITS, WorkerPool
from pretrain.common.errors import UserError
from pretrain.common.files import write_bytes
from pretrain.common.run_files import run_around
from pretrain.data.manifest import (
    FORMAT,
    ByteEntropy,
    Manifest,
    SourceEntry,
    TokenizerEntry,
    content_hash,
    settings_hash,
)
from pretrain.data.manifest import NAME as MANIFEST
from pretrain.data.tokenizer import FILE_NAMES, Tokenizer


def prepare(config: DataPrepConfig, overwrite: bool = False) -> Manifest:
    """Build the data set that ``config`` describes, resuming an interrupted build.

    Returns the manifest. Raises :class:`UserError` for bad input, a full disk, or an output built
    from other settings (unless ``overwrite``).
    """
    output = Path(config.output)
    _check_output(config)
    try:
        sources = [open_source(source) for source in config.sources]
        settings = _settings(config)
        fingerprints = {source.config.name: source.fingerprint for source in sources}
        if not overwrite and (output / MANIFEST).exists():
            manifest = Manifest.load(output)
            found = {source.name: source.fingerprint for source in manifest.sources}
            _same_input(output, manifest.settings, found, settings, fingerprints)
            manifest.verify_sizes(output)
            print(f"{output} is complete and unchanged: nothing to do")
            return manifest
        watched = [WatchedFiles(source.config.name, source.local_files()) for source in sources]
        for source in sources:
            _check_holds_text(source)
            if (remark := source.remark()) is not None:
                print(f"note: {remark}", file=sys.stderr)
        with _locked(output):
            progress = _start(output, settings, fingerprints, overwrite)
            try:
                manifest = _run(config, sources, watched, progress, output)
            except UserError as error:
                if progress.tokenizer_sha256 is None:  # nothing made yet: leave no trace
                    shutil.rmtree(output / ".partial")
                    with suppress(OSError):  # the folder may hold other files
                        output.rmdir()
                if changed := _changes(watched):
                    raise UserError(f"{error} ({'; '.join(changed)})") from None
                raise
            manifest.save(output)
            shutil.rmtree(output / ".partial")
        return manifest
    except OSError as error:
        raise UserError(_explain(error, output)) from error


def _check_output(config: DataPrepConfig) -> None:
    """Raise UserError for an output in a run's directory, or among the text of a source."""
    output = Path(config.output).resolve()
    run = run_around(output)
    if run is not None:
        raise UserError(
            f"output is {config.output}, which is in the directory of a run, {run}; expected a "
            "folder of its own, such as data/NAME"
        )
    for source in config.sources:
        for entry in source.paths:
            path = Path(entry).expanduser()
            if path.is_dir() and output.is_relative_to(path.resolve()):
                raise UserError(
                    f"output is {config.output}, which is in {entry}, where source "
                    f"'{source.name}' reads its text; expected a folder elsewhere, such as "
                    "data/NAME"
                )


def _changes(watched: list[WatchedFiles]) -> list[str]:
    return [change for files in watched if (change := files.changes()) is not None]


def _run(
    config: DataPrepConfig,
    sources: list[Source],
    watched: list[WatchedFiles],
    progress: Progress,
    output: Path,
) -> Manifest:
    start = time.monotonic()
    before = sum(shard.bytes for shard in progress.shards)
    processes = config.processes or os.cpu_count() or 1
    with ProgressDisplay() as display, WorkerPool(processes) as pool:
        if progress.shards:
            display.say(f"resuming after {len(progress.shards)} complete shard files")
        tokenizer = _tokenizer(config, progress, output, pool, display)
        write_shards(
            sources,
            tokenizer,
            progress,
            output,
            pool,
            config.shard_bytes,
            config.validation_fraction,
            display,
        )
    manifest = _manifest(config, progress, tokenizer)
    manifest.warnings += _changes(watched)
    seconds = time.monotonic() - start
    made = sum(shard.bytes for shard in progress.shards) - before
    print_summary(manifest, str(output), seconds, made)
    return manifest


def _tokenizer(
    config: DataPrepConfig,
    progress: Progress,
    output: Path,
    pool: WorkerPool,
    display: ProgressDisplay,
) -> Tokenizer:
    """Return the data set's tokenizer: of an earlier start, of an existing file, or trained now."""
    existing = config.tokenizer.path
    original = Tokenizer.load(existing).path if existing else None
    path = output / FILE_NAMES[original is not None and original.suffix == ".json"]
    if path.is_file() and file_hash(path) == progress.tokenizer_sha256:
        return Tokenizer.load(path)
    if original is not None:
        content = original.read_bytes()
    else:
        display.say(
            f"training the tokenizer: {config.tokenizer.kind}, "
            f"{config.tokenizer.vocab_size:,} pieces"
        )
        # In a worker, so that its memory is freed and a signal need not wait for the C++ code.
        future = pool.submit(train_tokenizer, config)
        indexed_dataset()  # meanwhile: importing it takes as long
        content = pool.result(future)
    if progress.shards:
        raise UserError(
            f"{path} is missing or has changed, but existing shards were made with it: start over "
            "with --overwrite"
        )
    write_bytes(path, content)
    tokenizer = Tokenizer.load(path)
    progress.tokenizer_sha256 = tokenizer.sha256
    progress.save()
    return tokenizer


def _settings(config: DataPrepConfig) -> dict[str, Any]:
    """Return the settings that decide the shards' content: not the output nor the processes."""
    settings = dataclasses.asdict(config)
    del settings["output"], settings["processes"]
    for source in settings["sources"]:
        if not source["options"]:
            del source["options"]  # data sets of kinds without any may be older than the setting
    if config.tokenizer.path:
        settings["tokenizer"] = {"sha256": Tokenizer.load(config.tokenizer.path).sha256}
    return settings


def _same_input(
    output: Path,
    old_settings: dict[str, Any],
    old_fingerprints: dict[str, str],
    settings: dict[str, Any],
    fingerprints: dict[str, str],
) -> None:
    """Raise :class:`UserError` when ``output`` was made from other settings or other text."""
    advice = "choose another output, or replace it with --overwrite"
    differences = list(_differences(old_settings, settings))
    changed = [f"{name} was {old}, now is {new}" for name, old, new in differences]
    weights = {name: new for name, _, new in differences if name.endswith(".weight")}
    if weights and len(weights) == len(differences):
        names = [settings["sources"][int(name.split(".")[1])]["name"] for name in weights]
        chosen = ", ".join(f"{n}: {w}" for n, w in zip(names, weights.values(), strict=True))
        advice = (
            f"a run can have weights of its own, data: {{path: {output}, weights: {{{chosen}}}}}, "
            f"and nothing is tokenized again; or {advice}"
        )
    if changed:
        raise UserError(f"{output} was made from other settings ({'; '.join(changed)}): {advice}")
    for name, fingerprint in fingerprints.items():
        if old_fingerprints.get(name) != fingerprint:
            raise UserError(f"source '{name}' has changed since {output} was made: {advice}")


def _differences(old: Any, new: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield the name, old value and new value of each setting that differs."""
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        old, new = dict(enumerate(old)), dict(enumerate(new))
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield name, old, new


def _check_holds_text(source: Source) -> None:
    """Raise :class:`UserError` for a source in which no document has any text."""
    for file in range(source.file_count):
        for document in source.read(file):
            try:
                if document.content.decode():
                    return
            except UnicodeDecodeError:
                continue
    raise UserError(
        f"source '{source.config.name}' holds no text: all its documents are empty or not UTF-8"
    )


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep a second run from writing to the same folder."""
    partial = output / ".partial"
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {output}: wait for it to end") from None
        yield


def _start(
    output: Path, settings: dict[str, Any], fingerprints: dict[str, str], overwrite: bool
) -> Progress:
    """Return the progress to resume from; remove the shards in ``output`` that it does not list."""
    path = output / ".partial" / PROGRESS
    progress = None if overwrite else Progress.load(path)
    if progress is None and not overwrite and (foreign := shard_files(output)):
        raise UserError(
            f"{output} holds shards of unknown origin ({foreign[0].name}): choose another output, "
            "or remove them with --overwrite"
        )
    if progress is not None and progress.shards:
        _same_input(output, progress.settings, progress.fingerprints, settings, fingerprints)
    else:
        (output / MANIFEST).unlink(missing_ok=True)  # first: what follows invalidates it
        progress = Progress(settings, fingerprints, path=str(path))
        progress.save()
        for name in FILE_NAMES:
            (output / name).unlink(missing_ok=True)
    listed = {f"{shard.name}.{suffix}" for shard in progress.shards for suffix in shard.size}
    for file in shard_files(output):
        if file.name not in listed:
            file.unlink()
    for file in (output / ".partial").iterdir():
        if file.name not in (PROGRESS, "lock"):
            file.unlink()
    return progress


def _manifest(config: DataPrepConfig, progress: Progress, tokenizer: Tokenizer) -> Manifest:
    sources = []
    for source in config.sources:
        splits = {split: progress.counts(source.name, split) for split in SPLITS}
        sources.append(
            SourceEntry(
                name=source.name,
                kind=source.kind,
                weight=source.weight,
                fingerprint=progress.fingerprints[source.name],
                documents=sum(counts.documents for counts in splits.values()),
                bytes=sum(counts.bytes for counts in splits.values()),
                skipped=progress.skipped.get(source.name, {}),
                splits=splits,
            )
        )
    warnings = []
    if config.validation_fraction > 0 and not any(s.splits["valid"].documents for s in sources):
        warnings.append(
            "no document fell into the validation split: add documents or raise validation_fraction"
        )
    if not any(source.splits["train"].documents for source in sources):
        warnings.append(
            "no document fell into the training split: add documents or lower validation_fraction"
        )
    if not tokenizer.lossless:
        warnings.append("this tokenizer does not restore text byte for byte")
    return Manifest(
        format=FORMAT,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        settings=progress.settings,
        settings_sha256=settings_hash(progress.settings),
        content_sha256=content_hash(progress.shards, tokenizer.sha256),
        tokenizer=TokenizerEntry(
            file=tokenizer.path.name,
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            sha256=tokenizer.sha256,
            lossless=tokenizer.lossless,
        ),
        dtype=tokenizer.dtype.name,
        byte_entropy=ByteEntropy(*progress.entropies()),
        sources=sources,
        shards=progress.shards,
        warnings=warnings,
    )


def _explain(error: OSError, output: Path) -> str:
    where = error.filename or output
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk that holds {output.resolve()} is full: complete shards are kept, free some "
            "space and run the same command again to resume"
        )
    return f"{where}: {error.strerror or error}"
