"""Writing checkpoints: from a copy, in the background, atomically."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import datetime
import errno
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from pretrain.checkpoint.sharded_state import HoldsState, State, StorageError, weights_state
from pretrain.checkpoint.staging import Staging
from pretrain.checkpoint.state import CheckpointState
from pretrain.checkpoint.storage import save_state, storage
from pretrain.checkpoint_folders import (
    STATE_FILE,
    checkpoint_name,
    checkpoint_step,
    list_checkpoints,
    mark_latest,
    next_save_number,
)
from pretrain.common.errors import UserError
from pretrain.common.files import file_sha256, sync, write_bytes, write_failure, write_json
from pretrain.config import RunConfig, to_yaml
from pretrain.parallel.background import in_background
from pretrain.parallel.processes import on_every_process, on_main_process
from pretrain.run_directory import CONFIG_FILE


class CheckpointWriter:
    """A writer of an engine's checkpoints; all processes must make the same calls.

    :meth:`save` copies what this process has to write and returns; a thread writes it. One save at
    a time: the next waits for it. Up to ``retries`` saves in a row may fail, which is only told to
    ``report``; the next one raises.
    """

    def __init__(
        self,
        directory: Path,
        config: RunConfig,
        tokenizer: Path | None = None,
        extra: Path | None = None,
        *,
        retries: int = 0,
        report: Callable[[str], None] = print,
    ):
        """Create a writer; ``tokenizer``, a file, and ``extra``, a folder, come with every save."""
        self.directory, self.config, self._tokenizer = directory, config, tokenizer
        self._retries, self._report = retries, report
        self.failures = 0
        """Saves that have failed since the last one that did not."""
        self._saved: Path | None = None
        self._extra, self._staging = extra, Staging()
        self._pending: Future[Path] | None = None
        self._thread: threading.Thread | None = None  # that writes it
        # A separate group: training communicates meanwhile. Not over NCCL, whose order matters.
        self._group = None
        if dist.get_world_size() > 1:
            minutes = 2 * config.parallel.timeout_minutes
            timeout = datetime.timedelta(minutes=minutes)
            self._group = dist.new_group(backend="gloo", timeout=timeout)

    def save(self, engine: HoldsState, state: CheckpointState) -> None:
        """Begin to write ``directory/step-N``. Raises UserError where too many saves failed."""
        self.begin(_local_state(engine), state)

    def begin(self, local: State, state: CheckpointState) -> None:
        """Begin to write ``local``, the state that this process has to write; see :meth:`save`."""
        self.wait()
        state = copy.deepcopy(state)
        if not self.config.checkpoint.background:
            self._pending = _finished(lambda: self._write(local, state))
            self.check()
            return
        copies, wait_for_copies = self._staging.copy(local)

        def write() -> Path:
            wait_for_copies()
            return self._write(copies, state)

        self._pending, self._thread = in_background(write, "checkpoint")

    def check(self) -> None:
        """Report a save that has failed since, or raise UserError where that was one too many."""
        if self._pending is None or not self._pending.done():
            return
        pending, self._pending = self._pending, None
        try:
            self._saved, self.failures = pending.result(), 0
        except UserError as error:
            self.count_failure(str(error))

    def count_failure(self, reason: str) -> None:
        """Count a save that failed, and report it, or raise UserError where it was one too many."""
        self.failures += 1
        if self.failures > self._retries:
            again = f" ({self.failures} saves in a row have failed)" if self._retries else ""
            raise UserError(f"{reason}{again}") from None
        left = self._retries - self.failures
        more = f"after {left + 1} more saves in a row" if left else "if the next save fails too"
        self._report(f"warning: {reason}; the run ends {more} (checkpoint.retries)")

    def wait(self) -> Path | None:
        """Wait for the save at hand, and return the last checkpoint saved, if any.

        Raises UserError where it could not be written, and was one too many.
        """
        if self._thread is not None:
            self._thread.join()
        self.check()
        return self._saved

    def abandon(self) -> None:
        """Wait for the save at hand, whatever becomes of it, and free the memory of its copy."""
        with contextlib.suppress(Exception):
            self.wait()
        self._staging.free()

    def close(self) -> None:
        """Wait, free the memory, and leave the process group that the writer made for itself."""
        self.wait()
        self._staging.free()
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def _write(self, local: State, state: CheckpointState) -> Path:
        final = self.directory / checkpoint_name(state.step)
        writing = on_main_process(lambda: self._begin(final), self._group)
        try:
            save_state(local, writing, self._group)
            on_main_process(lambda: self._describe(writing, state), self._group)
            hashes = _hash_all_files(writing, self._group)
            on_main_process(lambda: _publish(writing, final, hashes, self.config), self._group)
        except (StorageError, OSError) as error:
            # Every process gets here for what happened to one of them.
            refusal = _not_written(final, error)
            shutil.rmtree(writing, ignore_errors=True)
            raise refusal from None
        return final

    def _begin(self, final: Path) -> Path:
        writing = self.directory / f".writing-{final.name}-{uuid.uuid4().hex[:8]}"
        try:
            for left_over in self.directory.glob(".writing-*"):
                shutil.rmtree(left_over, ignore_errors=True)
            writing.mkdir(parents=True)
        except OSError as error:
            raise _not_written(final, error) from None
        return writing

    def _describe(self, writing: Path, state: CheckpointState) -> None:
        state.save = next_save_number(self.directory)
        write_json(writing / STATE_FILE, dataclasses.asdict(state))
        write_bytes(writing / CONFIG_FILE, to_yaml(self.config).encode())
        if self._tokenizer is not None:
            # With its tokenizer a checkpoint can be used wherever it lies.
            write_bytes(writing / self._tokenizer.name, self._tokenizer.read_bytes())
        if self._extra is not None:
            shutil.copytree(self._extra, writing / self._extra.name)


def save_checkpoint(
    directory: Path, engine: HoldsState, config: RunConfig, state: CheckpointState
) -> Path:
    """Write ``directory/step-N`` now; see :class:`CheckpointWriter`."""
    writer = CheckpointWriter(directory, config)
    writer.save(engine, state)
    path = writer.wait()
    assert path is not None
    return path


def write_weights(
    directory: Path,
    model: nn.Module,
    config: RunConfig,
    state: CheckpointState,
    tokenizer: Path,
    extra: Path | None = None,
) -> Path:
    """Write ``directory/step-N`` of weights alone, which training cannot continue from.

    ``extra`` is a folder that comes with it.
    """
    writer = CheckpointWriter(directory, config, tokenizer, extra)
    writer.begin(weights_state([model], saving=True), state)
    path = writer.wait()
    assert path is not None
    return path


def _local_state(engine: HoldsState) -> State:
    return {
        **engine.backend.weights_state(saving=True),
        **engine.backend.optimizer_state(saving=True),
        **engine.carried_state(),
    }


def _finished(function: Callable[[], Path]) -> Future[Path]:
    future: Future[Path] = Future()
    try:
        future.set_result(function())
    except UserError as error:
        future.set_exception(error)
    return future


def _hash_all_files(folder: Path, group: dist.ProcessGroup | None) -> dict[str, dict[str, Any]]:
    """Flush and hash every file of ``folder``, shared out over the processes."""

    def list_files() -> list[str]:
        return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    # As the main process sees them: on a file system that is not shared, others' are missing.
    names = on_main_process(list_files, group)

    def check_seen() -> None:
        if any(p.name not in names for p in storage().files_of(folder, dist.get_rank())):
            raise OSError(
                errno.ENOENT,
                "the main process does not see what another one wrote; the run "
                "directory must be on a file system that all share",
            )

    on_every_process(check_seen, group)

    def hash_local_share() -> dict[str, dict[str, Any]]:
        hashed = {}
        for name in names[dist.get_rank() :: dist.get_world_size()]:
            path = folder / name
            sync(path)
            hashed[name] = {"size": path.stat().st_size, "sha256": file_sha256(path)}
        return hashed

    parts = on_every_process(hash_local_share, group)
    return {name: entry for part in parts for name, entry in sorted(part.items())}


def _publish(writing: Path, final: Path, hashes: dict[str, Any], config: RunConfig) -> None:
    write_json(writing / "files.json", hashes)
    sync(writing)
    _replace_folder(writing, final)
    mark_latest(final)
    _remove_old(final, config)


def _not_written(final: Path, error: BaseException) -> UserError:
    earlier = list_checkpoints(final.parent)
    if isinstance(error, OSError):
        reason = write_failure(error, final)
    else:
        reason = str(error).strip().splitlines()[-1]
    return UserError(
        f"cannot write checkpoint {final}: {reason}; "
        + (f"the last complete one is {earlier[0].name}" if earlier else "there is no earlier one")
    )


def _replace_folder(writing: Path, final: Path) -> None:
    if final.exists():  # saved again after a resume from an earlier step
        old = final.with_name(f".writing-old-{final.name}")
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        writing.rename(final)
        shutil.rmtree(old, ignore_errors=True)
    else:
        writing.rename(final)
    sync(final.parent)


def _remove_old(newest: Path, config: RunConfig) -> None:
    """Remove the checkpoints that need not be kept.

    Later steps than ``newest``, left from before a resume from an earlier one, do not count.
    """
    milestone = config.checkpoint.milestone_every
    kept = config.kept_steps
    done = [p for p in list_checkpoints(newest.parent) if p.name <= newest.name]
    for path in done[config.checkpoint.keep_last :]:
        step = checkpoint_step(path)
        if step not in kept and not (milestone and step % milestone == 0):
            hidden = path.with_name(f".writing-removed-{path.name}")
            path.rename(hidden)  # hidden first, so that no half-removed one is ever seen
            shutil.rmtree(hidden, ignore_errors=True)
