"""Runs and grids by their directories, in every command that takes them."""

from __future__ import annotations

import json

import pytest

from launch.__main__ import main
from launch.directories import load_targets, note_grid
from launch.expansion import load_grid
from launch.grid import Grid
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory

CONFIG = """
name: ladder
directory: {folder}/runs/ladder
model: {{hidden_size: 16, pattern: attn, vocab_size: 64, mixers: {{attn: {{num_heads: 2}}}}}}
data: {{path: data/none}}
schedule: {{warmup_steps: 1}}
train: {{steps: 4, seq_len: 32, global_batch_tokens: 64}}
parallel: {{micro_batch_size: 2}}
grid: {{optimizer.lr: [1e-2, 1e-3], seed: [0, 1], match: tokens}}
"""
NAMES = ["lr=0.01,seed=0", "lr=0.01,seed=1", "lr=0.001,seed=0", "lr=0.001,seed=1"]


@pytest.fixture
def grid(tmp_path) -> Grid:
    """A grid that was launched, of which one run has begun."""
    config = tmp_path / "grid.yaml"
    config.write_text(CONFIG.format(folder=tmp_path))
    found = load_grid(config)
    note_grid(found)
    run = RunDirectory(found.members[0].config.run_directory)
    run.write_config(found.members[0].config)
    rows = [{"step": step, "tokens": 64 * step, "loss": 4.0} for step in (1, 2)]
    run.write_metrics(rows)
    return found


def names_of(found):
    return [member.name for member in found.members]


def test_a_grids_directory_stands_for_its_runs(grid, tmp_path):
    found = load_targets([str(grid.directory)])
    assert names_of(found) == NAMES, "in the order of the config"
    assert (found.name, found.match) == ("ladder", "tokens")
    for member, launched in zip(found.members, grid.members, strict=True):
        assert member.config == launched.config
    (tmp_path / "link").symlink_to(grid.directory)
    linked = load_targets([str(tmp_path / "link")])
    assert names_of(linked) == NAMES


def test_globs_and_several_words_name_each_run_once(grid, tmp_path, monkeypatch):
    directory = str(grid.directory)
    for words in (
        [f"{directory}/*"],
        sorted(str(path) for path in grid.directory.iterdir()),
        [directory, f"{directory}/{NAMES[0]}", f"{directory}/*seed=1"],
        [str(tmp_path / "grid.yaml"), directory],
    ):
        found = load_targets(words)
        assert sorted(names_of(found)) == sorted(NAMES), words
    monkeypatch.chdir(grid.directory)
    # A folder is a run, although its name looks like an override.
    assert len(load_targets([NAMES[0], NAMES[1]]).members) == 2
    (member,) = load_targets([NAMES[0], "optimizer.lr=0.5", "data.path=a/b=c"]).members
    assert member.config.optimizer.lr == 0.5 and member.config.data.path == "a/b=c"
    assert load_targets([".", "seed=7"]).members[3].config.seed == 7


def test_a_run_that_was_moved_is_where_it_is(grid, tmp_path):
    moved = tmp_path / "elsewhere"
    (grid.directory / NAMES[0]).rename(moved)
    (member,) = load_targets([str(moved)]).members
    assert member.config.run_directory == moved
    (member,) = load_targets([str(moved), "name=again", f"directory={tmp_path}/again"]).members
    assert member.config.run_directory == tmp_path / "again"


def test_status_takes_what_report_takes(grid, capsys):
    directory = grid.directory
    for words in ([directory], [f"{directory}/*"], [directory / name for name in NAMES]):
        assert main(["status", *map(str, words)]) == 0
        output = capsys.readouterr().out
        rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
        states = {row[1].strip(): row[2].strip() for row in rows}
        assert states == {NAMES[0]: "stopped"} | dict.fromkeys(NAMES[1:], "waiting")
        assert all(len(row) == 10 for row in rows), "no column for reasons where there is none"
        assert "2/4" in output and "4.0000" in output


def test_a_reason_has_a_column(grid, capsys):
    RunDirectory(grid.members[0].config.run_directory).write_launch(status=1, reason="[red] x|y")
    assert main(["status", str(grid.directory)]) == 0
    output = capsys.readouterr().out
    assert "reason" in output and "[red] x|y" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{folder}"], "is a folder without config.yaml and without runs in it"),
        (["{folder}/none*"], "no such run directory or file"),
        (["{folder}/none.yaml"], "no config file at"),
        (["{grid}", "name=other"], "holds 4 runs, which name=other would make one"),
        (["{grid}", "directory=other"], "holds 4 runs, which directory=other would make one"),
        (["{grid}", "{folder}/none"], "none: no such run directory or file"),
    ],
)
def test_bad_input_is_one_sentence(grid, tmp_path, words, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(UserError, match=message):
        load_targets([word.format(folder=folder, grid=grid.directory) for word in words])


def test_what_the_launcher_notes_of_a_grid(grid, tmp_path):
    noted = json.loads((grid.directory / "grid.json").read_text())
    config = str(tmp_path / "grid.yaml")
    labels = {
        name: {"optimizer.lr": name[3:].partition(",")[0], "seed": name[-1]} for name in NAMES
    }
    assert noted == {"config": config, "match": "tokens", "members": NAMES, "labels": labels}
    note_grid(load_targets([str(grid.directory)]))
    assert json.loads((grid.directory / "grid.json").read_text()) == noted


def test_nodes_of_the_command_go_before_the_clusters(tmp_path, capsys):
    config, cluster = tmp_path / "run.yaml", tmp_path / "cluster.yaml"
    text = CONFIG.format(folder=tmp_path).split("grid:", maxsplit=1)[0]
    config.write_text(text.replace("micro_batch_size: 2", "micro_batch_size: 1"))
    cluster.write_text("kind: slurm\nnodes: 1\nprocesses_per_node: 1\n")
    for words, nodes in (([], 1), (["--nodes", "2"], 2)):
        assert main([str(config), "--cluster", str(cluster), "--dry-run", *words]) == 0
        output = capsys.readouterr().out
        assert f"#SBATCH --nodes={nodes}\n" in output
        assert f"srun --kill-on-bad-exit=1 --nodes={nodes}" in output
    with pytest.raises(UserError, match="--nodes is 2, but this machine is one node"):
        main([str(config), "--nodes", "2", "--dry-run"])


def test_a_grid_that_comes_with_the_package_is_noted_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = load_grid("configs/grids/hybrid-ratio-tiny.yaml")
    note_grid(found)
    again = load_targets(["runs/hybrid-ratio-tiny"])
    assert [m.name for m in again.members] == [m.name for m in found.members]
    assert again.match == "parameters"
