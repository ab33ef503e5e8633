"""Hugging Face ``datasets`` as a source: hub names, builders over local files, saved folders."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from data_prep.config import SourceConfig
from data_prep.documents import Document, Source, text_of
from pretrain.common.errors import UserError

T = TypeVar("T")


class HuggingFace(Source):
    """One split of a Hugging Face data set, as a single file of rows.

    Raises :class:`UserError` when the ``datasets`` package is missing or cannot read the data set.
    """

    settings: ClassVar = {
        "dataset": "a hub name, a builder, or a folder",
        "config": None,
        "data_files": None,
        "split": None,
        "revision": None,
        "streaming": None,
    }

    def __init__(self, config: SourceConfig) -> None:
        super().__init__(config)
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"source '{config.name}' needs the datasets package: pip install datasets"
            ) from None
        self._library = datasets
        folder = Path(str(config.dataset))
        saved = (folder / "state.json", folder / "dataset_dict.json")
        self._saved = folder if any(path.is_file() for path in saved) else None
        self._builder: Any = None if self._saved else self._guard(self._open_builder)

    def _open_builder(self) -> Any:
        config = self.config
        return self._library.load_dataset_builder(
            config.dataset,
            config.config,
            data_files=config.data_files or None,
            revision=config.revision,
        )

    def _guard(self, action: Callable[[], T]) -> T:
        """Run ``action``, turning whatever ``datasets`` raises into a one-sentence UserError."""
        try:
            return action()
        except UserError:
            raise
        except Exception as error:  # the library raises whatever its parts raise
            words = " ".join(str(error).split())[:300]
            raise UserError(
                f"source '{self.config.name}': datasets cannot read "
                f"{self.config.dataset} ({type(error).__name__}: {words})"
            ) from None

    @cached_property
    def _rows(self) -> Any:
        return self._guard(self._open_rows)

    def _open_rows(self) -> Any:
        config = self.config
        if self._saved:
            rows = self._library.load_from_disk(str(self._saved))
            if isinstance(rows, self._library.DatasetDict):
                rows = rows[config.split]
        elif config.streaming:
            rows = self._builder.as_streaming_dataset(split=config.split)
        else:
            self._builder.download_and_prepare()
            rows = self._builder.as_dataset(split=config.split)
        if rows.column_names is None:
            return rows  # a stream, whose columns are known only from its rows
        text_of(dict.fromkeys(rows.column_names), config.text_field, f"source '{config.name}'")
        return rows.select_columns([config.text_field])

    @property
    def sizes(self) -> list[int] | None:
        """Number of rows, None for a stream."""
        if isinstance(self._rows, self._library.Dataset):
            return [self._rows.num_rows]
        return None

    def local_files(self) -> list[Path]:
        """Return the files that a builder reads here, or those of the saved data set."""
        if self._saved is not None:
            return sorted(path for path in self._saved.rglob("*") if path.is_file())
        named = self._builder.config.data_files or {}
        return sorted({Path(p) for paths in named.values() for p in paths if Path(p).is_file()})

    @property
    def file_count(self) -> int:
        """Number of files: the split counts as one."""
        return 1

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the builder with its files' times of change, or of the saved data set."""
        if self._builder is None:
            parts = [self._rows._fingerprint]
        else:
            parts = [self._builder.hash, self._builder.config_id, self._builder.dataset_name]
        return hashlib.sha256("\0".join([*map(str, parts), self.config.split]).encode()).hexdigest()

    def read(self, file: int, skip: int = 0) -> Iterator[Document]:
        """Yield the rows' texts, skipping the first ``skip`` rows."""
        rows = iter(self._rows.skip(skip) if skip else self._rows)
        number = skip
        while (row := self._guard(lambda: next(rows, None))) is not None:
            number += 1
            where = f"source '{self.config.name}', row {number}"
            yield Document(text_of(row, self.config.text_field, where), number)


SOURCE = HuggingFace
