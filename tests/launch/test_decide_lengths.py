"""``python -m launch decide``: lengths as branches of each other, hours, and earlier decisions."""

from __future__ import annotations

import json
import math

import pytest

from evals.scaling.decide.record import LOG
from evals.scaling.decide.runs import Run
from evals.scaling.decide.trunks import Trunks
from launch.__main__ import main
from launch.decisions import command
from launch.decisions.checking import check
from launch.decisions.history import learned
from launch.decisions.plan import load_plan
from launch.decisions.running import members_of
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory
from tests.helpers.decisions import CONFIG, answers, changed

WSD = ("{warmup_steps: 1}", "{kind: wsd, warmup_steps: 1, decay_fraction: 0.25}")
LENGTHS = ("seeds: 2", "lengths: [0.5, 1]\n  seeds: 2")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "decide.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=tmp_path / "data"))
    return changed(path, WSD, LENGTHS)


def test_a_run_begins_where_the_longest_part_of_it_was_trained() -> None:
    tokens = (100.0, 200.0, 400.0)
    short, middle, long = (Run("a", 10.0, t, 0, 1.0) for t in tokens)
    trunks = Trunks({("a", (10.0, t)): 0.75 * t for t in tokens})
    assert trunks.beginning(short, []) == (None, 0.0)
    assert trunks.beginning(middle, [short]) == (short, 75.0)
    assert trunks.beginning(long, [short, middle]) == (middle, 150.0)
    # The branch from 150 on holds nothing of what comes before, the whole run does.
    assert trunks.beginning(short, [middle, long]) == (middle, 75.0)
    assert trunks.priced(middle, [short]).cost == pytest.approx(60 * (200 - 75))
    diverged = Run("a", 10.0, 100.0, 0, math.nan)
    for other in (diverged, Run("b", 10.0, 100.0, 0, 1.0), Run("a", 10.0, 100.0, 1, 1.0)):
        assert trunks.beginning(middle, [other]) == (None, 0.0)


def test_what_is_spent_is_what_is_new_and_a_resumed_log_is_the_same(file, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "execute", answers)
    main(["decide", str(file)])
    folder = tmp_path / "runs"
    whole = (folder / LOG).read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    plan = load_plan(file)
    prices = {(r.arm, r.parameters, r.tokens, r.seed): r.cost for r in plan.runs}
    made = [tuple(run[:4]) for run in rows[-1]["runs"]]
    again = [
        key for key in made if sum(other[:2] + other[3:] == key[:2] + key[3:] for other in made) > 1
    ]
    assert again, "no size was run at both lengths"
    assert rows[-1]["spent"] < sum(prices[key] for key in made) * (1 - 1e-6)
    assert "are what their runs give" in check(folder)
    for number in range(1, len(rows)):
        (folder / LOG).write_bytes(b"".join(whole.splitlines(keepends=True)[:number]))
        main(["decide", str(file)])
        assert (folder / LOG).read_bytes() == whole


def test_branches_are_of_a_run_that_keeps_their_beginning(file):
    plan = load_plan(file)
    short, long = sorted(r for r in plan.runs if r.arm == "linear" and r.seed == 0)[:2]
    done = answers(plan, [short], [], None, print)
    (member,) = members_of(plan, [long], done)
    trunk = plan.members[short.arm, short.cell, 0].config
    branch = member.config.branch
    assert branch is not None
    assert branch.run == str(trunk.run_directory)
    assert branch.tokens is not None and branch.tokens in trunk.checkpoint.keep
    steps = member.config.first_step
    assert steps == trunk.plan.num_steps * 3 // 4
    rates = [[c.plan.learning_rate(step) for step in range(steps)] for c in (trunk, member.config)]
    assert rates[0] == rates[1]
    assert plan.members[long.arm, long.cell, 0].config.branch is None


def test_lengths_of_other_schedules_are_runs_of_their_own(file, capsys):
    changed(file, ("kind: wsd", "kind: cosine"))
    assert load_plan(file).trunks == Trunks()
    main(["decide", str(file), "--dry-run"])
    assert (
        "Each length is a run of its own: only with schedule.kind: wsd" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ("[0.4, 1]", "those under half the target's"),
        ("[1, 0.9999]", "the same number of whole steps"),
        ("[2]", "lengths"),
    ],
)
def test_lengths_that_would_not_be_used_are_refused(file, lengths, said):
    with pytest.raises(UserError, match=said):
        load_plan(changed(file, ("[0.5, 1]", lengths)))


def test_a_decision_that_has_ended_is_what_the_next_one_expects(file, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "execute", answers)
    changed(file, ("  seeds: 2", f"  history: [{tmp_path / 'before'}]\n  seeds: 2"))
    with pytest.raises(UserError, match=r"history: .*before is no folder of a decision"):
        load_plan(file)
    first = tmp_path / "first.yaml"
    first.write_text(CONFIG.format(folder=tmp_path, data=tmp_path / "data"))
    main(["decide", str(changed(first, ("/runs", "/before")))])
    plain, prior = load_plan(first).prior, load_plan(file).prior
    assert all(0.35 <= now <= then for now, then in zip(prior.spreads, plain.spreads, strict=True))
    # Runs of the fake answers lie within a thousandth of a law: noise is less than was expected.
    assert prior.medians[3] < plain.medians[3]
    assert json.dumps(prior.medians[3]) in json.dumps(load_plan(file).content())
    with pytest.raises(UserError, match="this decision's own folder"):
        learned(plain, [str(tmp_path / "before")], tmp_path / "before", "decide")
    lines = (tmp_path / "before" / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / "before" / LOG).write_bytes(b"".join(lines[:-1]))
    with pytest.raises(UserError, match="has not ended"):
        load_plan(file)


@pytest.mark.slow
def test_real_runs_are_branches_priced_in_hours_used_again_and_checked(tmp_path, corpus, capsys):
    path = tmp_path / "decide.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=corpus))
    changed(
        path,
        WSD,
        ("seeds: 2", "lengths: [0.5, 1]\n  seeds: 1\n  cost: hours"),
        ("{model.hidden_size: 24}, {model.hidden_size: 48}]", "{model.hidden_size: 48}]"),
    )
    assert main(["decide", str(path), "--at-once", "2"]) == 0
    folder = tmp_path / "runs"
    made = [RunDirectory(run) for run in sorted(folder.glob("*-seed0"))]
    branches = [branch for run in made if (branch := run.read_config().branch) is not None]
    assert branches
    folders = {str(run.path) for run in made}
    assert all(branch.run in folders for branch in branches)
    assert "are what their runs give" in check(folder)
    changed(path, ("name: decision", "name: again"), ("/runs", "/elsewhere"))
    capsys.readouterr()
    assert main(["decide", str(path), "--ask", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert f"step {len(made)} " in shown, "every run was used"
    assert "P(best)" in shown
    assert not (tmp_path / "elsewhere").exists()
