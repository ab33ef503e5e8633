"""``launch decide targets``: the target runs of a decision, and whether its verdict was right."""

from __future__ import annotations

import json
import math

import pytest

from evals.scaling.decide.record import TARGETS, VERDICT
from launch.__main__ import main
from launch.decisions import command, targets
from launch.decisions.plan import load_plan
from launch.members import DONE, FAILED, MemberState
from pretrain.common.errors import UserError
from tests.helpers.decisions import CONFIG, answers


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "decide.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=tmp_path / "data"))
    return path


def ended(monkeypatch, values, state=DONE):
    """Let target runs have ended with values by arm and seed."""
    made = []

    def make(plan, members, options, show):
        made.extend(members)
        return {member.name: MemberState(state) for member in members}

    def value_of(folder, plan, state):
        arm, _, seed = folder.name.split("-")
        return math.nan if state == FAILED else values[arm][int(seed[-1])]

    monkeypatch.setattr(command, "execute", answers)
    monkeypatch.setattr(targets, "make", make)
    monkeypatch.setattr(targets, "value_of", value_of)
    return made


@pytest.mark.parametrize("held", [True, False])
def test_target_runs_say_whether_the_verdict_was_right(file, tmp_path, monkeypatch, capsys, held):
    worse = 0.02 if held else -0.02
    values = {"attention": [2.3, 2.302], "linear": [2.3 + worse, 2.302 + worse]}
    made = ended(monkeypatch, values)
    with pytest.raises(UserError, match="has no verdict that target runs could check"):
        main(["decide", "targets", str(file)])
    assert main(["decide", str(file)]) == 0
    assert main(["decide", "targets", str(file), "--seeds", "2"]) == 0
    said = capsys.readouterr().out
    assert ("the verdict held: attention better than linear" in said) is held
    assert ("the verdict was wrong: attention better than linear" in said) is not held
    names = [f"{arm}-target-seed{seed}" for seed in (0, 1) for arm in ("linear", "attention")]
    assert [member.name for member in made] == names
    assert {member.config.model.hidden_size for member in made} == {80}
    assert [member.config.seed for member in made] == [0, 0, 1, 1]
    counts = {int(member.config.plan.tokens) for member in made}
    assert counts == {40000}
    found = json.loads((tmp_path / "runs" / TARGETS).read_text())
    assert found["best"] == ("attention" if held else "linear")
    (pair,) = found["pairs"]
    low, middle, high = pair["believed"]
    assert low < middle < high
    assert (pair["found"] > 1) is (held == (pair["arms"][0] == "attention"))


def test_a_target_run_that_failed_has_no_part(file, monkeypatch, capsys):
    ended(monkeypatch, {}, FAILED)
    main(["decide", str(file)])
    assert main(["decide", "targets", str(file)]) == 0
    said = capsys.readouterr().out
    assert "linear-target-seed0 has no value: it failed or diverged" in said
    assert "the verdict, attention better than linear, cannot be checked" in said
    assert "cannot be told" not in said


def test_a_verdict_that_was_not_written_is_asked_for(file, tmp_path, monkeypatch):
    made = ended(monkeypatch, {}, FAILED)
    main(["decide", str(file)])
    (tmp_path / "runs" / VERDICT).unlink()
    with pytest.raises(UserError, match=r"verdict.json is missing or damaged"):
        main(["decide", "targets", str(file)])
    assert not made


def test_a_pair_is_compared_in_units_of_compute(file, monkeypatch):
    """Where the target runs lie on the curves that the runs came from, so does the difference."""
    monkeypatch.setattr(command, "execute", answers)
    main(["decide", str(file)])
    plan = load_plan(file)
    rows = targets.read_log(plan.directory, plan.digest)
    done = targets.runs_of_row(rows[-1], plan.runs, plan.trunks)
    step = plan.campaign().step(done, plan.left(done))
    at = next(iter(plan.targets.values())).parameters
    value = 2 + 10 * at**-0.3
    found = targets.compare(plan, step, {"attention": [value], "linear": [value + 0.02]})
    (pair,) = found["pairs"]
    low, _, high = pair["believed"]
    assert low < pair["found"] < high
