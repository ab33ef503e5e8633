"""What this machine cannot hold is refused before any member of a grid starts."""

from __future__ import annotations

from typing import Any

import pytest

from launch import fitting
from launch.__main__ import main
from launch.expansion import load_grid
from launch.fitting import what_does_not_fit
from pretrain.common.errors import UserError
from tests.helpers.small_grid import GRID, SETTINGS

PATTERNS = ("gdn", "attn")


@pytest.fixture
def grid(tmp_path, corpus):
    path = tmp_path / "grid.yaml"
    path.write_text(SETTINGS.format(folder=tmp_path, data=corpus) + GRID)
    return path


@pytest.fixture
def planned(monkeypatch) -> list[str]:
    """The patterns of the runs that the planner looks at."""
    looked: list[str] = []
    real = fitting.state_that_fits

    def look(config: Any, *arguments: Any) -> Any:
        looked.append(config.model.pattern)
        return real(config, *arguments)

    monkeypatch.setattr(fitting, "state_that_fits", look)
    return looked


@pytest.fixture
def started(monkeypatch) -> list[bool]:
    """Whether queues of runs began with ``force``."""
    found: list[bool] = []

    def run_queue(members: Any, *, force: bool, **_: Any) -> dict[str, int]:
        found.append(force)
        return {member.name: 0 for member in members}

    monkeypatch.setattr("launch.local.run_queue", run_queue)
    return found


def free(monkeypatch, number: float) -> None:
    monkeypatch.setattr(fitting, "free_memory", lambda: number)


def state_of(grid, pattern: str) -> float:
    config = next(
        m.config for m in load_grid(grid, []).members if m.config.model.pattern == pattern
    )
    vocab_size = fitting.planned_vocab_size(config, "test")
    return fitting.state_that_fits(config, vocab_size, 1, fitting.Room(1e12, 1))[0]


def test_each_member_that_does_not_fit_is_named_and_nothing_starts(
    grid, monkeypatch, planned, started, capsys
):
    free(monkeypatch, 0.6 * min(state_of(grid, pattern) for pattern in PATTERNS))
    planned.clear()
    with pytest.raises(UserError, match="gdn,seed=0 does not fit: the weights, gradients") as error:
        main([str(grid)])
    message, printed = str(error.value), capsys.readouterr().out
    assert message.startswith(f"{grid}: ") and "nor do 3 other members" in message
    assert "would fit" in message and "--force starts it as it is" in message
    assert printed.count("does not fit: the weights") == 4 and planned == ["gdn", "attn"]
    assert not started and not (grid.parent / "runs").exists()
    assert main([str(grid), "--dry-run"]) == 0 and not started
    assert capsys.readouterr().out.count("does not fit: the weights") == 4
    assert main([str(grid), "--force"]) == 0 and started == [True]


def test_members_that_fit_are_not_named(grid, monkeypatch, planned):
    gdn, attn = state_of(grid, "gdn"), state_of(grid, "attn")
    assert gdn != attn
    planned.clear()
    free(monkeypatch, (gdn + attn) / 2)
    larger = "gdn" if gdn > attn else "attn"
    found = what_does_not_fit(load_grid(grid, []).members)
    assert len(found) == 2 and all(larger in sentence.split()[0] for sentence in found)


def test_runs_side_by_side_share_the_memory(grid, monkeypatch, started):
    members = load_grid(grid, []).members
    sizes = sorted((state_of(grid, m.config.model.pattern) for m in members), reverse=True)
    free(monkeypatch, sizes[0] + sizes[1])
    assert what_does_not_fit(members, at_once=2) == []
    free(monkeypatch, sizes[0] + sizes[1] - 1)
    assert what_does_not_fit(members, at_once=1) == []
    with pytest.raises(UserError, match=r",seed=0 and .*,seed=1 do not fit beside each other: "):
        main([str(grid), "--at-once", "2"])
    assert not started


def test_processes_share_a_machine_but_not_a_gpu(grid, monkeypatch):
    members = load_grid(grid, ["parallel.zero_stage=0"]).members
    monkeypatch.setattr("launch.local._available", lambda: 2)
    largest = max(state_of(grid, pattern) for pattern in PATTERNS)
    free(monkeypatch, 1.5 * largest)
    assert len(what_does_not_fit(members, processes=2)) >= 2
    free(monkeypatch, 2.5 * largest)  # room for two processes, which are one run
    assert what_does_not_fit(members, processes=2) == []
    (sentence,) = what_does_not_fit(members, processes=2, at_once=2)
    assert "do not fit beside each other" in sentence
    monkeypatch.setattr(fitting, "free_on_gpus", lambda: 1.5 * largest)
    monkeypatch.setattr(fitting.torch.cuda, "is_available", lambda: True)
    assert what_does_not_fit(members, processes=2) == []


def test_a_grid_of_small_runs_asks_no_planner(grid, planned):
    assert what_does_not_fit(load_grid(grid, []).members * 500) == [] and not planned


def test_runs_whose_data_is_missing_say_so_themselves(grid, monkeypatch, planned):
    free(monkeypatch, 1.0)
    members = load_grid(grid, ["data.path=nowhere"]).members
    assert what_does_not_fit(members) == [] and not planned


def test_runs_of_more_processes_than_the_machine_has_are_refused(grid, monkeypatch):
    monkeypatch.setattr("launch.local._available", lambda: 2)
    members = load_grid(grid, ["parallel.context=4"]).members
    with pytest.raises(UserError, match=r"needs 4 processes \(.* x context = 1 x 1 x 4\), more"):
        what_does_not_fit(members)
    with pytest.raises(UserError, match="needs 3 processes, more than this machine's 2"):
        what_does_not_fit(members, processes=3)
