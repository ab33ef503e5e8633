"""Open the source of text that a config describes."""

from __future__ import annotations

from data_prep.config import SourceConfig
from data_prep.documents import Source
from data_prep.huggingface import HuggingFace
from data_prep.local_files import Files, StandardLibrary, find_files


def open_source(config: SourceConfig) -> Source:
    """Return the source that ``config`` describes.

    Raises :class:`UserError` when it is missing or holds no files.
    """
    if config.kind == "stdlib":
        return StandardLibrary(config)
    if config.kind == "files":
        return Files(config, find_files(config))
    return HuggingFace(config)
