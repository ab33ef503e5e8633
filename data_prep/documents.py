"""The interface of a source of text: documents in an order that never changes.

A source is a list of files, each a list of documents; a position in it is (file, number of its
documents already read). Documents are bytes as they were stored: the workers decode them, and count
those that are not UTF-8.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data_prep.config import SourceConfig
from pretrain.common.config_loader import Config, build_config
from pretrain.common.errors import UserError


@dataclass(frozen=True)
class Document:
    """One document, and how far into its file reading has come after it."""

    content: bytes
    consumed: int  # of the file's entry in Source.sizes, for the progress bar


class Source(ABC):
    """Text in a fixed order, readable from any position; a kind of source is a subclass."""

    settings: ClassVar[dict[str, str | None]] = {}
    """The settings of :class:`SourceConfig` that are for this kind alone. What has words is to be
    set, and the words say to what."""
    options_class: ClassVar[type[Config] | None] = None
    """The dataclass of further settings, which a data config gives under ``options``."""
    options: Any = None
    """Those settings, an instance of it."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        if self.options_class is not None:
            where = f"source '{config.name}'"
            self.options = build_config(self.options_class, config.options, where)

    @property
    @abstractmethod
    def sizes(self) -> list[int] | None:
        """Size of each file, in bytes on disk or in rows; None when it cannot be known."""

    @property
    @abstractmethod
    def file_count(self) -> int:
        """Number of files."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A hash that changes when the text does; cheap enough to compute at each start."""

    def local_files(self) -> list[Path]:
        """Return the files on this machine that hold the text, none where that cannot be known."""
        return []

    def remark(self) -> str | None:
        """Return what someone should know before the text is read, or None."""
        return None

    @abstractmethod
    def read(self, file: int, skip: int = 0) -> Iterator[Document]:
        """Yield the documents of one file, skipping the first ``skip``.

        Raises :class:`UserError` for a file that is damaged or cannot be read.
        """


def text_of(row: dict[str, Any], field: str, where: str) -> bytes:
    """Return the text of a row as UTF-8; null counts as empty.

    Raises :class:`UserError`, beginning with ``where``, for a row without such a text field.
    """
    if field not in row:
        raise UserError(
            f"{where}: no text field '{field}', found: {', '.join(map(str, row)) or 'nothing'} "
            "(set text_field)"
        )
    text = row[field]
    if text is None:
        return b""
    if not isinstance(text, str):
        raise UserError(f"{where}: field '{field}' is {text!r:.60}, expected text")
    # Lone surrogates then fail to decode, as they should.
    return text.encode("utf-8", "surrogatepass")
