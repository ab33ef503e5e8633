"""Where a command writes is checked before its work, and nothing is made by that."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pretrain.common.errors import UserError
from pretrain.common.outputs import check_file, check_folder


def test_places_that_can_be_written_to_pass_and_stay_as_they_are(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "folder", tmp_path / "new" / "newer", tmp_path / "link" / "new"):
        check_folder(path, "--out")
        check_file(path / "x.json", "--json")
        check_folder(path.relative_to(tmp_path), "--out")
    check_file(tmp_path / "file", "--json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "link"]
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("check", "path", "words"),
    [
        (check_folder, "file", r"--out is .*/file, a file; expected a folder"),
        (check_folder, "file/a/b", r"--out is .*, but .*/file is a file; expected a folder there"),
        (check_file, "file/x.json", r"but .*/file is a file; expected a folder there"),
        (check_file, "folder", r"--out is .*/folder, a folder; expected a file, such as"),
        (check_folder, "broken/a", r"but .*/broken is a file"),
        (check_folder, "n" * 300 + "/a", "expected another name"),
        (check_file, "n" * 300 + "/a", "expected another name"),
    ],
)
def test_what_is_in_the_way_is_named(tmp_path, check, path, words):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=words) as error:
        check(tmp_path / path, "--out")
    assert "\n" not in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match=f"nothing can be written to {tmp_path}: Perm"):
        check_folder(tmp_path / "new", "--out")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
@pytest.mark.parametrize("check", [check_file, check_folder])
def test_a_file_system_that_takes_no_files_is_named(check):
    with pytest.raises(UserError, match="/proc/x/y, but nothing can be written to /proc:"):
        check(Path("/proc/x/y"), "--out")
