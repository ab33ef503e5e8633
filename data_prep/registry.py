"""The kinds of sources: the modules of data_prep/source_kinds, found by themselves."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_prep.documents import Source


def source_kinds() -> list[str]:
    """Return the names of all kinds, sorted; nothing is imported."""
    folder = Path(__file__).with_name("source_kinds")
    return sorted(module.name for module in pkgutil.iter_modules([str(folder)]))


def source_class(kind: str) -> type[Source]:
    """Return the class of a kind: what its module names ``SOURCE``."""
    module = importlib.import_module(f"data_prep.source_kinds.{kind}")
    found: type[Source] = module.SOURCE
    return found
