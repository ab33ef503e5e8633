"""``python -m launch decide``: plans, refusals, the log, and decisions that stop and go on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from evals.scaling.decide.record import LOG, PLAN, VERDICT
from launch.__main__ import main
from launch.decisions import command
from launch.decisions.checking import check
from launch.decisions.lock import hold
from launch.decisions.plan import load_plan
from pretrain.common.errors import EXIT_STOPPED, UserError
from tests.helpers.decisions import CONFIG, answers, changed


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "decide.yaml"
    path.write_text(CONFIG.format(folder=tmp_path, data=tmp_path / "data"))
    return path


def test_a_decision_ends_and_every_line_of_its_log_is_what_its_runs_give(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "execute", answers)
    assert main(["decide", str(file)]) == 0
    folder = tmp_path / "runs"
    said = json.loads((folder / VERDICT).read_text())
    assert said["verdict"] == "better"
    assert said["said"].startswith("attention is better")
    assert "why: every arm is run at the two smallest sizes first" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    plan = json.loads((folder / PLAN).read_text())
    assert {row["plan"] for row in rows} == {plan["hash"]}
    assert rows[-1]["spent"] <= 0.5 * sum(t["cost"] for t in plan["targets"].values())
    assert "are what their runs give" in check(folder)
    assert (folder / "beliefs.png").stat().st_size > 1000
    before = (folder / LOG).read_text()
    assert main(["decide", str(file)]) == 0  # once more: nothing is run or written
    assert (folder / LOG).read_text() == before
    main(["decide", "status", str(file)])
    assert "attention is better" in capsys.readouterr().out


def test_a_changed_line_a_changed_plan_and_another_file_are_found(file, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "execute", answers)
    main(["decide", str(file)])
    log, plan = tmp_path / "runs" / LOG, tmp_path / "runs" / PLAN
    lines = log.read_text().splitlines()
    row = json.loads(lines[2])
    row["runs"][0][4] += 0.1
    log.write_text("\n".join([*lines[:2], json.dumps(row), *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=r"line 4 does not follow from the line before it"):
        main(["decide", str(file)])
    log.write_text("\n".join([*lines[:2], json.dumps(row)]) + "\n")
    with pytest.raises(UserError, match=r"line 3 is not what its runs give"):
        check(tmp_path / "runs")
    text = plan.read_text()
    plan.write_text(text.replace('"budget": 0.5', '"budget": 0.9'))
    with pytest.raises(UserError, match=r"it was changed"):
        check(tmp_path / "runs")
    plan.write_text(text)
    with pytest.raises(UserError, match=r"choose another name"):
        main(["decide", str(changed(file, ("budget: 0.5", "budget: 0.6")))])


def test_stopped_anywhere_and_started_again_it_writes_the_same_log(file, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "execute", answers)
    main(["decide", str(file)])
    whole = (tmp_path / "runs" / LOG).read_bytes()
    for cut in (1, len(whole) // 3, len(whole) - 5):  # within a line, as a kill leaves it
        (tmp_path / "runs" / LOG).write_bytes(whole[:cut])
        main(["decide", str(file)])
        assert (tmp_path / "runs" / LOG).read_bytes() == whole
    monkeypatch.setattr(command, "execute", lambda *_: None)  # a run that was stopped
    (tmp_path / "runs" / LOG).write_bytes(whole.splitlines(keepends=True)[0])
    assert main(["decide", str(file)]) == EXIT_STOPPED
    monkeypatch.setattr(command, "execute", answers)
    main(["decide", str(file)])
    assert (tmp_path / "runs" / LOG).read_bytes() == whole


def test_a_failed_run_is_no_loss_and_a_second_one_ends_it(file, tmp_path, monkeypatch):
    def one(plan, runs, done, options, show):
        return [
            replace(run, value=math.nan)
            if (run.arm, run.seed) == ("linear", 0) and run.parameters in broken
            else run
            for run in answers(plan, runs, done, options, show)
        ]

    sizes = sorted({run.parameters for run in load_plan(file).runs})
    monkeypatch.setattr(command, "execute", one)
    broken = sizes[1:2]
    main(["decide", str(file)])
    first = json.loads((tmp_path / "runs" / VERDICT).read_text())
    assert first["reason"] != "unstable"
    broken = sizes[:2]
    main(["decide", str(changed(file, ("name: decision", "name: x"), ("/runs", "/other")))])
    second = json.loads((tmp_path / "other" / VERDICT).read_text())
    assert (second["reason"], second["verdict"]) == ("unstable", "cannot be told")
    assert "linear is unstable" in second["said"]
    assert check(tmp_path / "other")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("  mup_base_hidden_size: 32\n", "", "is neither tuned nor transferred"),
        ("{model.pattern: attn}", "{data.path: other}", "sets data.path and the metric is a loss"),
        (
            "{model.pattern: attn}",
            "{model.pattern: attn, validation.tokens: 64}",
            "losses on other windows of text are not compared",
        ),
        (", attention: {model.pattern: attn}", "", "arms has 1, expected two or more"),
        ("model.pattern: attn", "model.pattern: gdn", "two arms with the same settings"),
        ("model.pattern: attn", "model.hidden_size: 8", "which sizes set too"),
        ("budget: 0.5", "budget: 0.0001", "the two smallest sizes of all arms cost"),
        ("tokens: 40000", "tokens: 40000, more: 1", "more"),
        ("span: 6", "span: 20", "those within the budget span"),
        (
            "hidden_size: 80}, tokens",
            "hidden_size: 192}, tokens",
            "of the target's compute, and nothing is said below",
        ),
        ("seeds: 2", "seeds: none", "seeds"),
        ("{model.hidden_size: 24}", "{model.hidden_size: 12}", "expected the smallest first"),
        ("  match: parameters\n", "", "more than 20% apart"),
    ],
)
def test_what_cannot_be_compared_or_decided_is_refused_in_a_sentence(file, before, after, said):
    with pytest.raises(UserError) as error:
        load_plan(changed(file, (before, after)))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_an_arm_that_cannot_be_planned_is_left_out_and_the_others_go_on(file, capsys):
    bad = "attention: {model.pattern: attn}, odd: {model.pattern: no_such_layer}"
    plan = load_plan(changed(file, ("attention: {model.pattern: attn}", bad)))
    assert list(plan.targets) == ["linear", "attention"]
    assert "no_such_layer" in plan.left_out["odd"]
    changed(file, ("pattern: attn}", "pattern: nor_this}"))
    with pytest.raises(UserError, match="fewer than two can be planned"):
        load_plan(file)


def test_prices_and_the_next_run_are_shown_and_nothing_starts(file, tmp_path, capsys):
    main(["decide", str(file), "--dry-run"])
    shown = capsys.readouterr().out
    assert "6ND" in shown
    assert "true FLOPs" in shown
    assert "an arm must be worth" in shown
    main(["decide", str(file), "--next"])
    assert "every arm is run at the two smallest sizes first" in capsys.readouterr().out
    assert not (tmp_path / "runs").exists()


def test_a_table_is_played_and_what_it_lacks_is_said(tmp_path, capsys):
    table = tmp_path / "table.csv"
    rows = [
        f"{arm},{size},{20 * size},0,{2 + 10 * size**-0.3 + gap}"
        for arm, gap in (("a", 0.0), ("b", 0.05))
        for size in (20e6, 60e6, 150e6, 300e6, 1e9)
    ]
    table.write_text("arm,parameters,tokens,seed,loss\n" + "\n".join(rows) + "\n")
    assert main(["decide", "--replay", str(table), "--target", "1e9:2e10"]) == 0
    shown = capsys.readouterr().out
    assert "a is better" in shown
    assert "the table's runs at the target: a " in shown
    wrong = [
        (["--target", "1e9"], "expected PARAMETERS:TOKENS"),
        (["--target", "1e6:1e6"], "has no run below the target"),
        (["--target", "1e9:2e10", "--metric", "nll"], "has no column nll"),
        (["--target", "1e9:2e10", "--arms", "a;c"], "--arms has 'c'"),
        (["--target", "1e9:2e10", "--arms", "a"], "has 1 arms to decide between"),
        (["--target", "1e9:2e10", "--budget", "-1"], "--budget is -1.0"),
        (["--target", "1e9:2e10", "--at-once", "0"], "--at-once is 0"),
        (["--target", "1e9:2e10", "--confidence", "2"], "--confidence is 2.0"),
    ]
    for words, said in wrong:
        with pytest.raises(UserError) as error:
            main(["decide", "--replay", str(table), *words])
        assert said in str(error.value)
    lines = table.read_text().splitlines()
    # FLOPs that are no multiple of 6ND: the target is priced in them too.
    sizes = [float(line.split(",")[1]) for line in lines[1:]]
    flops = [
        60 * size**1.9 * (1 + line[0].count("a"))
        for size, line in zip(sizes, lines[1:], strict=True)
    ]
    rows = [f"{line},{cost}" for line, cost in zip(lines[1:], flops, strict=True)]
    table.write_text("\n".join([lines[0] + ",flops", *rows]))
    capsys.readouterr()
    main(["decide", "--replay", str(table), "--target", "1e9:2e10", "--budget", "1"])
    shown = capsys.readouterr().out
    first = sum(cost for size, cost in zip(sizes, flops, strict=True) if size <= 60e6)
    total = sum(cost for size, cost in zip(sizes, flops, strict=True) if size == 1e9)
    assert f"cost {first / total:.1%} of the targets" in shown
    assert "counted in the FLOPs of the table" in shown
    table.write_text(
        "\n".join([lines[0] + ",flops", lines[1] + ",1e18", *(x + "," for x in lines[2:])])
    )
    with pytest.raises(UserError, match="FLOPs counted differently"):
        main(["decide", "--replay", str(table), "--target", "1e9:2e10"])


def test_one_launcher_holds_the_folder_and_the_system_lets_it_go(file, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "execute", answers)
    with (
        hold(tmp_path / "runs"),
        pytest.raises(UserError, match=r"another process is deciding in .*runs: wait for it"),
    ):
        main(["decide", str(file)])
    assert not (tmp_path / "runs" / PLAN).exists()
    assert main(["decide", str(file)]) == 0  # its file is still there, and nobody holds it
