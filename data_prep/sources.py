"""Open the source of text that a config describes."""

from __future__ import annotations

from data_prep.config import SourceConfig
from data_prep.documents import Source
from data_prep.registry import source_class


def open_source(config: SourceConfig) -> Source:
    """Return the source that ``config`` describes.

    Raises :class:`UserError` when it is missing or holds no files.
    """
    return source_class(config.kind)(config)
