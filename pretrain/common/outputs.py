"""Check, before its work, that a command can write where it is asked to."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pretrain.common.errors import UserError


def check_file(path: Path, option: str) -> None:
    """Raise UserError where a file cannot be written to ``path``; nothing is made.

    ``option`` begins the message. Folders above it that are missing are expected to be made.
    """
    if os.path.isdir(path):  # noqa: PTH112  (also of names that are too long)
        raise UserError(f"{option} is {path}, a folder; expected a file, such as {path / 'out'}")
    _check_place(path.absolute().parent, path, option)


def check_folder(path: Path, option: str) -> None:
    """Raise UserError where ``path`` is no folder and cannot be made one; nothing is made."""
    if os.path.exists(path) and not path.is_dir():  # noqa: PTH110
        raise UserError(f"{option} is {path}, a file; expected a folder, new or old")
    _check_place(path.absolute(), path, option)


def _check_place(folder: Path, path: Path, option: str) -> None:
    try:
        above = next(each for each in (folder, *folder.parents) if _exists(each))
    except OSError as error:
        raise UserError(f"{option} is {path}: {error.strerror}; expected another name") from None
    if not above.is_dir():
        raise UserError(f"{option} is {path}, but {above} is a file; expected a folder there")
    try:
        with tempfile.TemporaryFile(dir=above):  # rights alone do not tell of /proc, or a full disk
            pass
    except OSError as error:
        raise UserError(
            f"{option} is {path}, but nothing can be written to {above}: {error.strerror}; "
            "expected another folder"
        ) from None


def _exists(path: Path) -> bool:
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
