"""The progress display while shards are written, and the summary afterwards."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pretrain.common.screen import plain_console, show_table, titled_table
from pretrain.data.manifest import Manifest

_SECONDS_BETWEEN_LINES = 5.0


class ProgressDisplay:
    """Show documents, MB/s and time left: a bar on a terminal, otherwise a line now and then."""

    def __init__(self) -> None:
        self._console = plain_console(stderr=True, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[words]}"),
                TimeRemainingColumn(),
                console=self._console,
            )
        self._task: TaskID | None = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> ProgressDisplay:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        self._console.print(message)

    def start_source(self, name: str, total: int | None, completed: int) -> None:
        """Begin a source of ``total`` units of work (None: unknown), ``completed`` already done."""
        self.name, self.total, self.before = name, total, completed
        self.documents = self.text_bytes = 0
        self._start = self._last = time.monotonic()
        if self._bar:
            self._task = self._bar.add_task(name, total=total, completed=completed, words="")

    def advance(self, documents: int, text_bytes: int, completed: int) -> None:
        """Add documents and bytes of text; ``completed`` is the total of units of work done."""
        self.documents += documents
        self.text_bytes += text_bytes
        now = time.monotonic()
        seconds = max(now - self._start, 1e-9)
        words = f"{self.documents:,} documents, {self.text_bytes / 1e6 / seconds:.1f} MB/s"
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=completed, words=words)
        elif now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            left = ""
            if self.total and completed > self.before:
                remaining = (self.total - completed) * seconds / (completed - self.before)
                left = f", {100 * completed / self.total:.0f} %, {remaining:.0f} s left"
            self.say(f"{self.name}: {words}{left}")


def print_summary(manifest: Manifest, directory: str, seconds: float, text_bytes: int) -> None:
    """Print the counts of a finished data set; this run read ``text_bytes`` in ``seconds``."""
    console = plain_console(soft_wrap=True)
    print_counts(manifest, directory, console)
    rate = text_bytes / 1e6 / seconds
    console.print(
        f"{text_bytes / 1e6:.1f} MB in {seconds:.1f} s: {rate:.1f} MB/s, including start-up and "
        "tokenizer training"
    )


def print_counts(manifest: Manifest, directory: str, console: Console) -> None:
    """Print what a data set holds, by source and split."""
    columns = ("source", "split", "documents", "MB", "tokens", "bytes/token", "shards")
    table = titled_table(directory, *columns, left=("split",))
    for source in manifest.sources:
        for split, counts in source.splits.items():
            shards = sum((s.source, s.split) == (source.name, split) for s in manifest.shards)
            ratio = f"{counts.bytes / counts.tokens:.2f}" if counts.tokens else "-"
            table.add_row(
                source.name,
                split,
                f"{counts.documents:,}",
                f"{counts.bytes / 1e6:.2f}",
                f"{counts.tokens:,}",
                ratio,
                str(shards),
            )
    show_table(table, console)
    for source in manifest.sources:
        if any(source.skipped.values()):
            words = ", ".join(f"{count:,} {why}" for why, count in source.skipped.items() if count)
            console.print(f"skipped in {source.name}: {words}")
    tokenizer, entropy = manifest.tokenizer, manifest.byte_entropy
    console.print(
        f"tokenizer: {tokenizer.kind}, {tokenizer.vocab_size:,} ids, stored as {manifest.dtype}"
    )
    console.print(
        f"bits per byte: {entropy.unigram:.2f} of single bytes, {entropy.bigram:.2f} of a byte "
        "given the previous one (a baseline for models)"
    )
    for warning in manifest.warnings:
        console.print(f"warning: {warning}")
