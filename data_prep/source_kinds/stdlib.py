"""The running Python's own library as a source."""

from __future__ import annotations

import hashlib
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from data_prep.source_kinds.files import FILE_NAMES, Files
from pretrain.common.config_loader import Config
from pretrain.common.errors import UserError

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


@dataclass
class StandardLibraryOptions(Config):
    """Settings of the standard library, under ``options``."""

    files: list[str] = field(default_factory=lambda: ["**/*.py"])
    """Globs of the files to read, within the library's folder."""


class StandardLibrary(Files):
    """The Python sources of the running interpreter, without its tests."""

    settings: ClassVar = {}
    options_class: ClassVar = StandardLibraryOptions
    root = Path(sysconfig.get_path("stdlib"))

    def find(self) -> list[Path]:
        """Return all of them. Raises :class:`UserError` where there are none."""
        assert isinstance(self.options, StandardLibraryOptions)
        globs = self.options.files
        for glob in globs:
            if not glob.endswith(".py") or Path(glob).is_absolute():
                raise UserError(
                    f"source '{self.config.name}': options.files has '{glob}', expected globs of "
                    "Python files within the library, such as 'json/*.py'"
                )
        paths = {p.relative_to(self.root) for glob in globs for p in self.root.glob(glob)}
        kept = [p for p in paths if not _SKIPPED.intersection(p.parts[:-1])]
        if not kept:
            raise UserError(
                f"source '{self.config.name}': no Python sources in {self.root} match "
                f"{', '.join(globs)}"
            )
        return [self.root / p for p in sorted(kept, key=Path.as_posix)]

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the content, so that equal interpreters on two machines agree."""
        digest = hashlib.sha256(f"{sys.version_info[:2]}\n".encode())
        for path in self.paths:
            digest.update(f"{path.relative_to(self.root).as_posix()}\n".encode(*FILE_NAMES))
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


SOURCE = StandardLibrary
