"""Local files as a source: text, JSON lines and Parquet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from data_prep.config import SourceConfig
from data_prep.documents import Document, Source, text_of
from pretrain.common.config_loader import Config
from pretrain.common.errors import UserError

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".jsonl.zst", ".parquet")
_TEXT = (".txt", ".md", ".py")  # a document each
_LONG_DOCUMENT = 4_000_000  # bytes: more than the longest novels
FILE_NAMES = ("utf-8", "surrogateescape")  # how to encode them: they need not be UTF-8
_READ_BYTES = 1 << 18


@dataclass
class FilesOptions(Config):
    """Settings of files, under ``options``."""

    separator: str | None = None
    """The text between two documents of a .txt, .md or .py file; null: each file is a document."""


class Files(Source):
    """Local files, with one document per .txt, .md and .py file, or per row of .jsonl and .parquet.

    Raises :class:`UserError` when all of them are empty.
    """

    settings: ClassVar = {"paths": "the files, folders or globs to read"}
    options_class: ClassVar[type[Config] | None] = FilesOptions

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        own = self.options if isinstance(self.options, FilesOptions) else None
        self.separator = None if own is None else own.separator
        if self.separator == "":
            raise UserError(
                f"source '{config.name}': options.separator is empty, expected the text between "
                'two documents, such as "\\n\\n"'
            )
        self.paths = self.find()
        if not any(self.sizes):
            raise UserError(f"source '{config.name}': all its {len(self.paths)} files are empty")

    def find(self) -> list[Path]:
        """Return the files, in the order in which they are read."""
        return find_files(self.config)

    @cached_property
    def sizes(self) -> list[int]:
        """Size of each file in bytes."""
        return [path.stat().st_size for path in self.paths]

    @property
    def file_count(self) -> int:
        """Number of files."""
        return len(self.paths)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of every file's path, size and time of last change."""
        digest = hashlib.sha256()
        for path in self.paths:
            status = path.stat()
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(*FILE_NAMES))
        return digest.hexdigest()

    def local_files(self) -> list[Path]:
        """Return all of them."""
        return self.paths

    def remark(self) -> str | None:
        """Return which text files are longer than a document usually is, and what divides them."""
        sizes = zip(self.paths, self.sizes, strict=True)
        long = [p for p, n in sizes if p.suffix in _TEXT and n > _LONG_DOCUMENT]
        if not long or self.separator is not None or self.options_class is not FilesOptions:
            return None
        first = f"{long[0]} ({long[0].stat().st_size / 1e6:.1f} MB)"
        become = (
            f"and {len(long) - 1} more are one document each"
            if len(long) > 1
            else "is one document"
        )
        return (
            f"source '{self.config.name}': {first} {become}, as text files are; options: "
            '{separator: "\\n\\n"} makes documents of the parts between blank lines, or of those '
            "between another text"
        )

    def read(self, file: int, skip: int = 0) -> Iterator[Document]:
        """Yield the documents of one file, skipping the first ``skip``."""
        path = self.paths[file]
        try:
            if path.name.endswith((".jsonl", ".jsonl.zst")):
                yield from _read_jsonl(path, self.config.text_field, skip)
            elif path.suffix == ".parquet":
                yield from _read_parquet(path, self.config.text_field, skip)
            elif self.separator is not None:
                yield from _read_separated(path, self.separator.encode(), skip)
            elif skip == 0:
                content = path.read_bytes()
                yield Document(content, len(content))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None


def find_files(config: SourceConfig) -> list[Path]:
    """Return the files that ``config.paths`` name, sorted, each once; skip hidden ones in folders.

    Raises :class:`UserError` for a path that is missing, matches nothing, or has no known suffix.
    """
    found: set[Path] = set()
    for entry in config.paths:
        path = Path(entry).expanduser()
        if path.is_file():
            if not path.name.endswith(SUFFIXES):
                raise UserError(f"{path}: cannot read this kind of file, only {_SUFFIX_WORDS}")
            found.add(path)
            continue
        if path.is_dir():
            matches = _readable(path.rglob("*"), path)
        elif any(c in entry for c in "*?["):
            parts = path.parts
            anchor = Path(path.anchor) if path.is_absolute() else Path()
            pattern = str(Path(*parts[1:])) if path.is_absolute() else str(path)
            matches = _readable(anchor.glob(pattern), anchor)
        else:
            raise UserError(f"source '{config.name}': no file or folder at {path}")
        if not matches:
            raise UserError(f"source '{config.name}': {entry} holds no {_SUFFIX_WORDS} file")
        found.update(matches)
    return sorted(found, key=Path.as_posix)


_SUFFIX_WORDS = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


def _readable(paths: Iterator[Path], root: Path) -> list[Path]:
    return [
        path
        for path in paths
        if path.name.endswith(SUFFIXES)
        and not any(part.startswith(".") and part != ".." for part in path.relative_to(root).parts)
        and path.is_file()
    ]


def _read_separated(path: Path, separator: bytes, skip: int) -> Iterator[Document]:
    rest, consumed, number = b"", 0, 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES):
            consumed += len(block)
            *whole, rest = (rest + block).split(separator)
            for content in whole:
                number += 1
                if number > skip:
                    yield Document(content, consumed)
    if rest and number >= skip:
        yield Document(rest, consumed)


def _read_jsonl(path: Path, field: str, skip: int) -> Iterator[Document]:
    for number, (line, consumed) in enumerate(_lines(path), start=1):
        if number <= skip:
            continue
        try:
            row = json.loads(line) if line.strip() else {field: ""}
        except UnicodeDecodeError:
            yield Document(line, consumed)  # the workers will count it as undecodable
            continue
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
        yield Document(text_of(row, field, f"{path}, line {number}"), consumed)


def _lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield each line, and how many bytes of the file have been read after it."""
    if path.name.endswith(".zst"):
        yield from _zstandard_lines(path)
        return
    consumed = 0
    with path.open("rb", buffering=_READ_BYTES) as file:
        for line in file:
            consumed += len(line)
            yield line, consumed


def _zstandard_lines(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompress by frames: the library's own reader takes a truncated file for a complete one."""
    import zstandard

    rest: list[bytes] = []
    frame, consumed = None, 0
    with path.open("rb") as file:
        while block := file.read(_READ_BYTES // 4):
            consumed += len(block)
            while block:
                if frame is None:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                try:
                    text = frame.decompress(block)
                except zstandard.ZstdError as error:
                    raise UserError(f"{path}: damaged zstandard file ({error})") from None
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = None
                *whole, last = text.split(b"\n")
                for line in whole:
                    yield b"".join((*rest, line)), consumed
                    rest = []
                rest.append(last)
    if frame is not None:
        raise UserError(f"{path}: damaged zstandard file (it ends in the middle of a frame)")
    if any(rest):
        yield b"".join(rest), consumed


def _read_parquet(path: Path, field: str, skip: int) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file ({_first_line(error)})") from None
    with file:
        if field not in file.schema_arrow.names:
            found = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no text field '{field}', found: {found} (set text_field)")
        kind = file.schema_arrow.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise UserError(f"{path}: field '{field}' is {kind}, expected text")
        size, rows = path.stat().st_size, file.metadata.num_rows
        row, groups = 0, list(range(file.metadata.num_row_groups))
        while groups and row + (count := file.metadata.row_group(groups[0]).num_rows) <= skip:
            row += count
            groups.pop(0)
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=groups, columns=[field]):
                # As binary, because bytes that are not UTF-8 are the workers' to count.
                for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
                    row += 1
                    if row > skip:
                        yield Document(value or b"", size * row // rows)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: damaged parquet file ({_first_line(error)})") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


SOURCE = Files
