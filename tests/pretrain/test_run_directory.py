"""The files of a run: their names are in one place, their formats are read as written."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint_folders import (
    checkpoint_name,
    checkpoint_step,
    latest_in,
    list_checkpoints,
    mark_latest,
)
from pretrain.common.errors import UserError
from pretrain.config import MLPConfig, ModelConfig, RunConfig
from pretrain.run_arguments import runs_below
from pretrain.run_directory import Run, RunDirectory, find_checkpoint, run_of_checkpoint

ROOT = Path(__file__).parents[2]


def test_what_is_written_is_read(tmp_path):
    run = RunDirectory(tmp_path / "run")
    assert (run.name, str(run), run.read_launch(), run.last_error()) == (
        "run",
        str(tmp_path / "run"),
        {},
        "",
    )
    model = ModelConfig(hidden_size=16, pattern="attn", mlp=MLPConfig(ratio=2))
    config = RunConfig("test", model)
    run.write_launch_config(config)
    run.write_config(config)
    assert run.read_config() == config
    assert run.launch_config_file.read_bytes() == run.config_file.read_bytes()
    assert run.read_model() == {}
    sizes = {"parameters": 3, "embedding_parameters": 1, "training_flops_per_token": 9.0}
    sizes["vocab_size"] = 2
    run.write_model(sizes)
    assert run.read_model() == sizes
    for damaged, words in {
        b"{": "is not JSON",
        b"\xff\xfe": "is not JSON",
        b"[1]": "has no number 'parameters'",
        b'{"parameters": 3}': "has no number 'embedding_parameters'",
        b'{"parameters": "x"}': "has no number 'parameters'",
    }.items():
        run.model_file.write_bytes(damaged)
        with pytest.raises(UserError, match=rf"model.json {words}"):
            run.read_model()
    run.write_launch(pid=1, status=None)
    run.write_launch(status=0)
    assert run.read_launch() == {"pid": 1, "status": 0}
    run.launch_file.write_text("[")
    assert run.read_launch() == {}
    run.output_file.write_text("error: first\nstep 1\nerror: last\nthe end\n")
    assert run.last_error() == "error: last"


def test_lines_of_the_metrics_that_are_cut_short_are_dropped(tmp_path):
    run = RunDirectory(tmp_path)
    rows: list[dict[str, Any]] = [
        {"step": 1, "tokens": 8, "loss": 2.0},
        {"step": 2, "tokens": 16, "loss": None},
    ]
    run.write_metrics(rows)
    with run.metrics_file.open("a") as file:
        file.write('[1]\n{"step": 3}\n{"step": 4, "tok')
    assert run.read_metrics() == rows
    (tmp_path / "b" / "c").mkdir(parents=True)
    RunDirectory(tmp_path / "b" / "c").write_metrics([])
    assert [r.path for r in runs_below(tmp_path)] == [tmp_path / "b" / "c", tmp_path]


def test_a_run_without_metrics_says_so(tmp_path):
    RunDirectory(tmp_path).write_config(
        RunConfig("test", ModelConfig(hidden_size=16, pattern="attn"))
    )
    run = Run(tmp_path)
    assert repr(run) == f"Run('{tmp_path}')"
    assert repr(RunDirectory("runs/a")) == "RunDirectory('runs/a')"
    with pytest.raises(UserError, match=r"has no metrics.jsonl, expected a run that has trained"):
        _ = run.metrics
    run.write_metrics([])
    assert run.metrics.loss.empty
    assert run.metrics["step"].empty
    run.write_metrics([{"step": 1, "tokens": 8, "mine": 2.0}])
    assert list(run.metrics) == ["step", "tokens", "mine"]


def test_one_holder_of_the_lock(tmp_path):
    first, second = RunDirectory(tmp_path / "run"), RunDirectory(tmp_path / "run")
    assert not first.is_locked()
    first.take_lock()
    assert second.is_locked()
    with pytest.raises(UserError, match="another process is training in"):
        second.take_lock()
    second.release_lock()
    assert first.is_locked(), "releasing what one does not hold changes nothing"
    first.release_lock()
    second.take_lock()
    second.release_lock()
    assert not first.is_locked()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the run directory"):
        RunDirectory(tmp_path / "file").take_lock()


def test_asking_for_the_lock_needs_no_right_to_write(tmp_path, monkeypatch):
    """A run of another user is running, not stopped."""
    run = RunDirectory(tmp_path)
    run.take_lock()
    plain = os.open

    def read_only(path, flags, *rest):
        if flags & (os.O_RDWR | os.O_WRONLY):
            raise PermissionError
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    assert RunDirectory(tmp_path).is_locked()


def test_a_grid_where_one_run_is_expected_names_its_runs(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "grid" / name / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no checkpoint at .*, such as .*grid/a, .*grid/b"):
        find_checkpoint(tmp_path / "grid")


def test_a_run_starts_while_another_process_asks_whether_it_does(tmp_path):
    code = """
import sys
from pretrain.run_directory import RunDirectory
run = RunDirectory(sys.argv[1])
print("asking", flush=True)
while True:
    run.is_locked()
"""
    run = RunDirectory(tmp_path)
    run.take_lock()
    run.release_lock()
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as asking:
        try:
            assert asking.stdout is not None
            assert asking.stdout.readline()
            for _ in range(2000):
                run.take_lock()
                run.release_lock()
        finally:
            asking.kill()


def test_checkpoints_by_name(tmp_path):
    run = RunDirectory(tmp_path)
    assert run.last_checkpoint() is None
    assert run.describe_last_checkpoint() == "there is no checkpoint yet"
    with pytest.raises(UserError, match="no checkpoint at"):
        find_checkpoint(tmp_path)
    folders = [run.checkpoints / checkpoint_name(step) for step in (5, 10, 123_456_789)]
    for folder in folders:
        folder.mkdir(parents=True)
    (run.checkpoints / ".writing-step-00000011").mkdir()
    assert list_checkpoints(run.checkpoints) == folders[::-1]
    assert [checkpoint_step(folder) for folder in folders] == [5, 10, 123_456_789]
    assert run.last_checkpoint() == folders[-1]
    mark_latest(folders[1])
    assert run.last_checkpoint() == find_checkpoint(tmp_path) == folders[1]
    assert find_checkpoint(folders[0]) == folders[0]
    assert run_of_checkpoint(folders[0]).path == tmp_path
    assert run.describe_last_checkpoint() == f"the last checkpoint is {folders[1]}"


def test_it_is_read_without_torch():
    code = "import sys, pretrain.run_directory; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_other_file_spells_the_names():
    files = (
        "metrics.jsonl|metrics-rolled-back.jsonl|config.yaml|model.json|environment.json"
        "|launch.json|launch.yaml|log.txt|output.txt|failure.txt|loss.png|.lock|latest"
    )
    folders = "checkpoints|plots|evals|tensorboard|profiles"
    spelled = re.compile(rf"""["']({files.replace(".", "[.]")})["']|/ ["']({folders})["']""")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for folder in ("pretrain", "launch", "evals", "benchmarks", "data_prep")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name
        not in ("run_directory.py", "run_files.py", "run_lock.py", "checkpoint_folders.py")
        and path.name != "exits.py"  # whose caches may keep the latest
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if spelled.search(line) and "with_suffix" not in line
    ]
    assert not found, "\n".join(found)


def test_a_directory_is_held_whatever_becomes_of_the_lock_file(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.take_lock()
    directory.lock_file.unlink()
    directory.check_held()
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="was removed while the run was training"):
        directory.check_held()
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="was replaced by another"):
        directory.check_held()
    directory.release_lock()
    directory.check_held()


def saved(folder, step, number):
    """Write what tells the age of a checkpoint; return its folder."""
    checkpoint = folder / checkpoint_name(step)
    checkpoint.mkdir(parents=True)
    content = json.dumps({"save": number}).encode()
    (checkpoint / "state.json").write_bytes(content)
    listed = {"state.json": {"sha256": hashlib.sha256(content).hexdigest()}}
    (checkpoint / "files.json").write_text(json.dumps(listed))
    mark_latest(checkpoint)
    return checkpoint


def test_a_damaged_checkpoint_is_the_latest_until_a_run_has_saved_after_it(tmp_path):
    """A run that was resumed from before it goes on from its own saves."""
    saved(tmp_path, 100, 1)
    damaged = saved(tmp_path, 150, 2)
    (damaged / "state.json").write_text("{}")
    assert latest_in(tmp_path) == damaged, "loading it says what is wrong"
    assert latest_in(tmp_path) == damaged
    after = saved(tmp_path, 120, 3)
    assert latest_in(tmp_path) == after
    (tmp_path / "latest").unlink()
    assert latest_in(tmp_path) == damaged, "it may have been saved after the others"
