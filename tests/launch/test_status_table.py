"""The table of a grid's members: means and speeds of the run, not of its last step."""

from __future__ import annotations

import pytest
from rich.console import Console

from launch.commands import states_of, table
from launch.expansion import load_grid
from launch.members import MemberState
from pretrain.run_directory import RunDirectory

CONFIG = """
name: g
directory: {folder}/runs
model: {{hidden_size: 32, pattern: "2*attn", mixers: {{attn: {{num_heads: 2}}}}}}
data: {{path: nowhere}}
train: {{steps: 10, seq_len: 16, global_batch_tokens: 64}}
schedule: {{warmup_steps: 2}}
parallel: {{micro_batch_size: 4}}
grid: {{seed: [0, 1, 2]}}
"""
ROWS = [
    {"step": 2, "tokens": 128, "loss": 5.0, "loss_mean": 5.5, "tokens_per_second": 10.0},
    {"step": 2, "tokens": 128, "valid_loss": 4.75, "valid_bits_per_byte": 2.125},
    {"step": 4, "tokens": 256, "loss": 4.0, "loss_mean": 4.25, "tokens_per_second": 40.0},
]


@pytest.fixture
def grid(tmp_path):
    path = tmp_path / "g.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    found = load_grid(path)
    earlier = [{k: v for k, v in row.items() if k != "loss_mean"} for row in ROWS[::2]]
    for member, rows in zip(found.members, (ROWS, earlier), strict=False):
        directory = RunDirectory(member.config.run_directory)
        directory.path.mkdir(parents=True)
        directory.write_metrics(rows)
    return found


def test_members_states_are_means_and_speeds_of_the_run(grid):
    states = states_of(grid)
    speed = 256 / (128 / 10 + 128 / 40)
    assert states["seed=0"] == MemberState("stopped", 4, 4.25, 4.75, 2.125, speed)
    assert states["seed=1"] == MemberState("stopped", 4, 4.0, None, None, speed)
    assert states["seed=2"] == MemberState("waiting")


def test_the_table_shows_them(grid):
    console = Console(width=200)
    with console.capture() as captured:
        console.print(table(grid, states_of(grid)))
    head, first, second, third = (
        [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]
        for line in captured.get().splitlines()
        if line.startswith(("┃", "│"))
    )
    columns = ["member", "state", "step", "loss", "validation loss", "bits per byte", "tokens/s"]
    assert head[:7] == columns
    assert first[:7] == ["seed=0", "stopped", "4/10", "4.2500", "4.7500", "2.1250", "16"]
    assert second[3:7] == ["4.0000", "", "", "16"]
    assert third[:7] == ["seed=2", "waiting", "0/10", "", "", "", ""]
