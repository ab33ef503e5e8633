"""Runs as commands are given them: directories, folders, globs and links, each run once."""

from __future__ import annotations

import pytest

from pretrain.common.errors import UserError
from pretrain.run_arguments import distinct_names, expand_paths, runs_below, runs_of
from pretrain.run_directory import RunDirectory


def run_at(path):
    path.mkdir(parents=True)
    RunDirectory(path).write_metrics([])
    return path


def paths_of(runs):
    return [run.path for run in runs]


def test_links_are_followed_and_a_run_is_listed_once(tmp_path):
    kept, elsewhere = run_at(tmp_path / "grid/a"), run_at(tmp_path / "disk/b")
    (tmp_path / "grid/0-link-to-a").symlink_to(kept)
    (tmp_path / "grid/b").symlink_to(elsewhere)
    (tmp_path / "grid/loop").symlink_to(tmp_path / "grid")
    (tmp_path / "grid/dangling").symlink_to(tmp_path / "nowhere")
    assert paths_of(runs_below(tmp_path / "grid")) == [kept, tmp_path / "grid/b"]
    (tmp_path / "link").symlink_to(tmp_path / "grid")
    assert paths_of(runs_of(tmp_path / "link")) == [tmp_path / "link/a", tmp_path / "link/b"]
    assert paths_of(runs_of(tmp_path / "grid/b")) == [tmp_path / "grid/b"]


def test_a_glob_of_a_grid_names_its_runs_alone(tmp_path, monkeypatch):
    runs = [run_at(tmp_path / "grid" / name) for name in ("lr=1,seed=0", "[red]")]
    for name in ("grid.json", "throughput.json", "job.sh", "slurm-12.txt"):
        (tmp_path / "grid" / name).write_text("{}")
    for words in ([tmp_path / "grid/*"], sorted((tmp_path / "grid").iterdir())):
        assert set(expand_paths(words)) == set(runs)
    # A name that is a pattern too means itself, and what is named twice is one.
    assert expand_paths([runs[1], tmp_path / "grid/[[]red]", runs[1]]) == [runs[1]]
    monkeypatch.chdir(tmp_path)
    assert [str(path) for path in expand_paths(["grid", "gri?", str(tmp_path / "grid")])] == [
        "grid"
    ]


@pytest.mark.parametrize("word", ["nothing", "grid/*", "none[ab]"])
def test_what_names_nothing_is_refused(tmp_path, word):
    with pytest.raises(UserError, match="no such run directory or file"):
        expand_paths([tmp_path / word])


def test_names_are_as_long_as_they_must_be(tmp_path):
    paths = [tmp_path / p for p in ("a/seed=0", "b/seed=0", "b/seed=1", "c/b/seed=1")]
    names = distinct_names(paths)
    assert names[:2] == ["a/seed=0", "b/seed=0"]
    assert len(set(names)) == 4
    assert distinct_names([tmp_path / "only"]) == ["only"]
