"""Grids of branches: they wait for their trunks, which may be members of the same grid."""

from __future__ import annotations

import json

import pytest

from launch.__main__ import main
from launch.branches import Waiting, check_trunks, coming_of
from launch.claims import claim
from launch.expansion import load_grid
from launch.members import MemberState
from pretrain.checkpoint_folders import checkpoint_name
from pretrain.common.config_loader import ConfigError
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory

CONFIG = """
name: tree
directory: {folder}/tree
model:
  hidden_size: 16
  pattern: gdn
  mixers: {{gdn: {{num_heads: 1, head_dim: 8}}}}
data: {{path: {data}}}
schedule: {{warmup_steps: 1}}
train: {{seq_len: 32, global_batch_tokens: 64}}
parallel: {{micro_batch_size: 2}}
validation: {{every: 0, tokens: 32}}
checkpoint: {{every: 1000, keep: [128, 256]}}
logging: {{every: 1}}
sample: {{tokens: 0}}
callbacks: {callbacks}
grid:
  zip:
    branch:
      early: {{run: "{folder}/tree/branch=trunk", tokens: 128}}
      late: {{run: "{folder}/tree/branch=trunk", tokens: 256}}
      trunk: null
    schedule.kind: [wsd, wsd, constant]
    train.steps: {{early: 4, late: 6, trunk: {steps}}}
"""


def write(folder, corpus, *, steps=8, callbacks="[]", **changes):
    text = CONFIG.format(folder=folder, data=corpus, steps=steps, callbacks=callbacks)
    for old, new in changes.items():
        text = text.replace(old, new)
    path = folder / "tree.yaml"
    path.write_text(text)
    return path


def trunk_in(folder):
    """The directory of the trunk, by the name that the branches give."""
    return folder / "tree/branch=trunk"


@pytest.fixture
def grid(tmp_path):
    """Of a trunk that is no member."""
    text = CONFIG.format(folder=tmp_path, data="nowhere", steps=8, callbacks="[]")
    lines = [x for x in text.splitlines() if "trunk: null" not in x]
    text = "\n".join(lines).replace("[wsd, wsd, constant]", "[wsd, wsd]")
    path = tmp_path / "branches.yaml"
    path.write_text(text.replace(", trunk: 8", ""))
    return load_grid(path)


def saves(folder, step):
    path = trunk_in(folder) / "checkpoints" / checkpoint_name(step)
    path.mkdir(parents=True)


def test_decays_of_members_begin_where_they_do(grid):
    early, late = grid.members
    assert early.config.schedule.decay_fraction == pytest.approx(2 / 4)
    assert late.config.schedule.decay_fraction == pytest.approx(2 / 6)
    assert [m.config.first_step for m in grid.members] == [2, 4]
    assert MemberState("waiting", tokens_per_second=64).seconds_left(late.config) == 2, "its own"


def test_branches_begin_when_their_trunk_has_come_that_far(grid, tmp_path, monkeypatch):
    monkeypatch.setattr("launch.branches._POLLED", 0.0)
    trunk, said = RunDirectory(trunk_in(tmp_path)), []
    held = claim(trunk)  # as another launcher
    assert held is not None
    waiting = Waiting(grid.members, lambda member, what: said.append((member.name, what)))
    for _ in range(3):
        assert waiting.next([]) == (None, "")
    assert [what for _, what in said] == [f"waits for step {n} of {trunk}" for n in (2, 4)]
    saves(tmp_path, 2)
    member, never = waiting.next([])
    assert member is grid.members[0] and never == ""
    assert waiting.next([]) == (None, "")
    held.release()  # the trunk ends before the second one's step
    member, never = waiting.next([])
    assert member is grid.members[1] and not waiting
    assert "branch.tokens is 256, step 4, of which" in never
    assert "its checkpoints: step 2 (128 tokens), and nothing trains it" in never


def test_a_branch_that_would_wait_for_ever_is_refused_before_anything_starts(grid, tmp_path):
    with pytest.raises(UserError, match=r"grid, member \S+: branch\.tokens is 128, step 2, but"):
        check_trunks(grid.members, "grid")
    saves(tmp_path, 2)
    with pytest.raises(UserError, match=r"step 2 \(128 tokens\), and nothing trains it"):
        check_trunks(grid.members, "grid")
    saves(tmp_path, 4)
    check_trunks(grid.members, "grid")


def test_a_step_that_the_trunk_does_not_keep_is_refused_at_once(tmp_path):
    path = write(tmp_path, "nowhere")
    names = [member.name for member in load_grid(path).members]
    path.write_text(path.read_text().replace("tree/branch=trunk", f"tree/{names[2]}"))
    check_trunks(load_grid(path).members, "grid")
    path.write_text(path.read_text().replace("keep: [128, 256]", "keep: [128]"))
    message = r"step 4, but \S+ saves no checkpoint there; expected 256 among its checkpoint\.keep"
    with pytest.raises(UserError, match=message):
        check_trunks(load_grid(path).members, "grid")
    path.write_text(path.read_text().replace("every: 1000", "every: 4"))
    check_trunks(load_grid(path).members, "grid")
    (tmp_path / "tree" / names[2] / "checkpoints" / checkpoint_name(8)).mkdir(parents=True)
    with pytest.raises(UserError, match=r"kept no checkpoint there; expected 128 among"):
        path.write_text(path.read_text().replace("keep: [128]", "keep: []"))
        check_trunks(load_grid(path).members, "grid")


def test_two_that_wait_for_each_other_are_not_coming(grid):
    one, two = grid.members
    one.config.branch.run, two.config.branch.run = (
        str(two.config.run_directory),
        str(one.config.run_directory),
    )
    assert coming_of(grid.members) == set()
    with pytest.raises(UserError, match=r"but there is no run at .*; expected a run in training"):
        check_trunks(grid.members, "grid")


def test_bad_branches_of_a_grid_are_one_sentence(tmp_path):
    for old, new, message in (
        (
            "tokens: 128",
            "tokens: 1280",
            r"branch\.tokens is 1280, expected less than .* 256 tokens",
        ),
        ("tokens: 128", "token: 128", r"unknown setting 'branch\.token' \(did you mean 'tokens'"),
        ("keep: [128, 256]", "keep: [128, 512]", r"checkpoint\.keep has 512, which .* 256 tokens"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_grid(write(tmp_path, "nowhere", **{old: new}))


@pytest.mark.slow
def test_a_grid_of_a_trunk_and_its_branches(tmp_path, corpus, capsys):
    """The branches come first in the file; the trunk ends after them, as it is slow."""
    slow = "[tests.helpers.slow_steps.SlowSteps]"
    path = write(tmp_path, corpus, steps=40, callbacks=slow)
    # The trunk's own name: as the branches have it.
    names = [member.name for member in load_grid(path).members]
    text = path.read_text().replace("tree/branch=trunk", f"tree/{names[2]}")
    path.write_text(text)
    assert main([str(path), "--at-once", "2"]) == 0
    shown = capsys.readouterr().out
    assert f"{names[0]}: waits for step 2 of {tmp_path}/tree/{names[2]}" in shown
    assert shown.count(": done") == 3
    launched = [json.loads((tmp_path / "tree" / n / "launch.json").read_text()) for n in names]
    assert launched[0]["started"] > launched[2]["started"]
    assert launched[0]["started"] < launched[2]["ended"], "while the trunk went on"
    steps = {}
    for name in names:
        rows = RunDirectory(tmp_path / "tree" / name).read_metrics()
        steps[name] = [row["step"] for row in rows if "loss" in row]
    assert list(steps.values()) == [[3, 4], [5, 6], list(range(1, 41))]
    assert main([str(path)]) == 0
    assert "nothing to start" in capsys.readouterr().out
