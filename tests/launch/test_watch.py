"""python -m launch watch: what it reads of runs as they grow, and what it says of them."""

from __future__ import annotations

import json
import os
import re
import time

import numpy as np
import pytest

from launch.__main__ import main
from launch.commands import states_of
from launch.directories import load_targets
from launch.watch.alerts import LogAlerts, LossAlerts, silence, worst_first
from launch.watch.curves import MOST, Curve
from launch.watch.tail import Tail
from launch.watch.watched import Watched
from pretrain.common.errors import UserError
from pretrain.run_directory import RunDirectory
from tests.helpers.nasty_names import NAMES
from tests.helpers.watched_runs import START, add_rows, make_run, rows


def now(watched, since=""):
    """The state as if the last look were long ago."""
    watched._refreshed = watched._search_again = 0.0
    return watched.state(since)


def texts(run):
    return [f"{alert['level']}: {alert['text']}" for alert in run["alerts"]]


# Files that grow


def test_a_tail_reads_what_is_new_and_complete(tmp_path):
    path = tmp_path / "lines"
    tail = Tail(path)
    assert tail.look() == (False, False)
    path.write_bytes(b"one\ntw")
    assert tail.look() == (True, False)
    assert list(tail.lines()) == ["one"]
    assert tail.look() == (False, False)
    with path.open("ab") as file:
        file.write("o\nthr\ufffd\n".encode())
    assert tail.look() == (True, False)
    assert list(tail.lines()) == ["two", "thr\ufffd"]
    (tmp_path / "new").write_bytes(b"another file, of more bytes\n")
    (tmp_path / "new").rename(path)
    assert tail.look() == (True, True)
    assert list(tail.lines()) == ["another file, of more bytes"]
    os.truncate(path, 0)
    assert tail.look() == (True, True)
    assert list(tail.lines()) == []
    path.unlink()
    assert tail.look() == (True, True)
    assert tail.look() == (False, False)


def test_a_long_curve_is_means_of_neighbours():
    curve = Curve(("x", "y"))
    for x in range(MOST):
        curve.add({"x": x, "y": None if x % 2 else x}, {"y": 2.0})
    assert curve.points()["x"] == list(range(MOST))
    assert curve.points()["y"][:3] == [0, None, 2]
    curve.add({"x": MOST, "y": MOST}, {"y": 2.0})
    assert curve.points()["x"][:2] == [0.5, 2.5]
    assert curve.points()["y"][:2] == [0, 2]
    for x in range(MOST + 1, 10_000):
        curve.add({"x": x, "y": x % 7}, {"y": 1.0 + x % 3})
    points = curve.points()["x"]
    assert MOST / 2 <= len(points) <= MOST
    assert np.all(np.diff(np.array(points, dtype=float)) > 0)
    assert curve.mean("x") == pytest.approx(sum(range(10_000)) / 10_000)
    empty = Curve(("x",))
    assert (empty.points(), empty.mean("x")) == ({"x": []}, None)


# Alerts

ORIGIN = "step 9: loss nan: the first NaN is made in block 1 (gdn), mixer, on rank 0 (a), in micro"
SLOW = (
    "rank 1 on b is slow: busy for 2 s a step where the others are for 1 s (2.0 times), mostly in"
)
SAVE = (
    "cannot write runs/a/step-9: full; the run ends if the next save fails too (checkpoint.retries)"
)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([ORIGIN], [("bad", ORIGIN)]),
        (["step 5: not finite, skipped (1 so far)"] * 3, [("warning", 3)]),
        (["step 5: loss 9.0 is a spike, skipped (1 steps so far)"], [("warning", 1)]),
        ([f"warning: step 4: {SLOW}"], [("warning", f"step 4: {SLOW}")]),
        ([f"warning: {SAVE}"], [("warning", SAVE)]),
        (["warning: a", "warning: b"], [("warning", "a"), ("warning", "b")]),
        (["step 5: Newton's method did not converge on 2 sequences, ..."], [("note", 1)]),
        (["step 5/20  loss 3.0  lr 1e-3", "run: 5,000 parameters", "  | nan"], []),
    ],
)
def test_what_the_log_warns_of(lines, expected):
    log = LogAlerts()
    for line in lines:
        log.add(f"2026-03-01 12:00:01 {line}")
    log.add("a line without a time: warning: x")
    found = log.since(START, saved=-1, ratio=None)
    assert len(found) == len(expected)
    for alert, (level, said) in zip(found, expected, strict=True):
        assert alert.level == level
        assert said in (alert.text, alert.count)
    assert log.since("2026-03-01T13:00:00", saved=-1, ratio=None) == [], "an earlier start's"


def test_what_is_over_is_no_alert():
    log = LogAlerts()
    for line in ("step 9/20  loss 3.0", f"warning: {SAVE}", f"warning: step 9: {SLOW}"):
        log.add(f"2026-03-01 12:00:01 {line}")

    def left(saved, ratio):
        return [a.text for a in log.since(START, saved=saved, ratio=ratio)]

    assert left(8, 1.9) == [SAVE, f"step 9: {SLOW}"]
    assert left(9, 1.9) == [f"step 9: {SLOW}"]
    assert left(8, 1.1) == [SAVE]


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda step: 3 + 5 / step, ""),
        (lambda step: 3 + 5 / step + (step % 2) * 0.25, ""),
        (lambda step: 3 + 5 / step if step < 30 else 3 + 0.2 * (step - 29), "diverges"),
        (lambda step: 10 + 0.02 * step, "diverges"),
        (lambda step: None if step == 40 else 3.0, "not finite"),
        (lambda step: None if step == 20 else 3.0, ""),
    ],
)
def test_losses_that_diverge(loss, expected):
    losses = LossAlerts()
    for row in rows(40, loss=loss):
        losses.add(row)
    found = " ".join(alert.text for alert in losses.alerts())
    assert expected in found
    assert bool(expected) == bool(found)


@pytest.mark.parametrize(
    ("age", "pause", "told"),
    [
        (200, None, False),
        (1000, None, True),
        (200, 1.0, False),
        (400, 1.0, True),
        (400, 200.0, False),
        (700, 200.0, True),
    ],
)
def test_a_run_that_has_not_written_for_long(age, pause, told):
    assert (silence(time.time() - age, pause) is not None) == told


def test_the_worst_alert_is_first():
    log = LogAlerts()
    for second, line in enumerate(["warning: a", ORIGIN, "warning: b"]):
        log.add(f"2026-03-01 12:00:0{second} {line}")
    found = worst_first(log.since(START, saved=0, ratio=None))
    assert [alert.text for alert in found] == [ORIGIN, "b", "a"]


def test_alerts_of_runs(tmp_path):
    folder = tmp_path / "runs"
    asked = make_run(folder, "asked", ["stopped by SIGINT after step 20, saved x"])
    make_run(folder, "killed")
    failed = make_run(folder, "failed")
    RunDirectory(failed).write_launch(status=1, reason="error: out of memory")
    crashed = make_run(folder, "crashed")
    (crashed / "failure.txt").write_text("process 1 of 2 on a: KeyError\n\nTraceback")
    damaged = make_run(folder, "damaged")
    (damaged / "config.yaml").write_text("model: [")
    stuck = make_run(folder, "stuck")
    long_ago = time.time() - 3600
    for name in ("metrics.jsonl", "log.txt"):
        os.utime(stuck / name, (long_ago, long_ago))
    waiting = folder / "waiting"
    waiting.mkdir()
    (waiting / "launch.yaml").write_text((asked / "config.yaml").read_text())
    held = RunDirectory(stuck)
    held.take_lock()
    try:
        found = {run["name"]: run for run in Watched([str(folder)]).state()["runs"]}
    finally:
        held.release_lock()
    assert {name: run["state"] for name, run in found.items()} == {
        **{"asked": "stopped", "killed": "stopped", "failed": "failed", "crashed": "stopped"},
        **{"damaged": "stopped", "stuck": "running", "waiting": "waiting"},
    }
    assert texts(found["asked"]) == texts(found["waiting"]) == []
    assert texts(found["failed"]) == ["bad: failed: out of memory"]
    assert texts(found["crashed"]) == ["bad: failed: process 1 of 2 on a: KeyError"]
    (killed,) = texts(found["killed"])
    assert killed.startswith("warning: ended after step 20, and its log does not say why")
    assert any("damaged/config.yaml" in text for text in texts(found["damaged"]))
    (quiet,) = texts(found["stuck"])
    assert quiet.startswith("warning: has written nothing since ")
    assert found["damaged"]["steps"] is None
    assert found["damaged"]["loss"] == found["asked"]["loss"]


# The state of all runs


def test_it_says_what_launch_status_says(tmp_path):
    folder = tmp_path / "runs"
    for name, speeds in (("a", (100.0, 400.0)), ("b", (50.0, 60.0))):
        directory = make_run(folder, name)
        measured = rows(10, speed=speeds[0]) + rows(20, 11, speed=speeds[1])
        measured[-1]["loss_mean"] = 3.5
        valid = {"step": 20, "tokens": 2560, "valid_loss": 4.0, "valid_bits_per_byte": 1.5}
        RunDirectory(directory).write_metrics([*measured, valid])
    held = RunDirectory(folder / "b")
    held.take_lock()
    try:
        grid = load_targets([str(folder)])
        states = states_of(grid)
        found = {run["name"]: run for run in Watched([str(folder)]).state()["runs"]}
    finally:
        held.release_lock()
    for member in grid.members:
        state, run = states[member.name], found[member.name]
        for name in ("state", "step", "loss", "valid_loss", "valid_bits_per_byte", "reason"):
            assert run[name] == getattr(state, name), (member.name, name)
        assert run["steps"] == member.config.plan.num_steps
    left = states["b"].seconds_left(grid.members[1].config)
    assert found["b"]["seconds_left"] == pytest.approx(left)
    assert found["a"]["seconds_left"] is None
    assert found["b"]["trained"]["tokens_per_second"][-1] == 60
    assert found["b"]["validated"]["valid_bits_per_byte"] == [1.5]
    assert found["b"]["goodput"] == 0.5


def test_only_what_has_changed_is_told(tmp_path):
    folder = tmp_path / "runs"
    first, second = make_run(folder / "g", "first"), make_run(folder / "g", "second")
    (folder / "g/grid.json").write_text(json.dumps({"members": ["second", "first"]}))
    watched = Watched([str(folder)])
    state = watched.state()
    assert state["order"] == [run["name"] for run in state["runs"]] == ["g/second", "g/first"]
    assert {run["group"] for run in state["runs"]} == {str(folder / "g")}
    assert now(watched, state["version"])["runs"] == []
    add_rows(first, rows(30, 21))
    later = now(watched, state["version"])
    (run,) = later["runs"]
    assert (run["name"], run["step"], len(run["trained"]["loss"])) == ("g/first", 30, 30)
    assert len(now(watched, "of another process-1")["runs"]) == 2
    assert len(now(watched, "nonsense")["runs"]) == 2
    # A run that resumes replaces its metrics by fewer lines.
    RunDirectory(first).write_metrics(rows(25))
    (run,) = now(watched, later["version"])["runs"]
    assert (run["step"], len(run["trained"]["loss"])) == (25, 25)
    third = make_run(folder, "third")
    version = now(watched)["version"]
    for path in sorted(second.iterdir()):
        path.unlink()
    second.rmdir()
    state = now(watched, version)
    assert state["order"] == ["third", "g/first"]
    assert state["runs"] == []
    assert RunDirectory(third).name == "third"
    # The folder itself may go, and come again.
    folder.rename(tmp_path / "elsewhere")
    assert now(watched)["order"] == []
    (tmp_path / "elsewhere").rename(folder)
    assert len(now(watched)["runs"]) == 2


def test_damaged_lines_are_passed_over(tmp_path):
    directory = make_run(tmp_path / "runs")
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21}\n[1]\nnull\n{"step": 21, "tokens": 9, "loss": "x"}\n\0\0\n{"ste')
    watched = Watched([str(tmp_path / "runs")])
    assert watched.state()["runs"][0]["step"] == 20
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('p": 21, "tokens": 2688, "loss": 2.5}\n')
    (run,) = now(watched)["runs"]
    assert (run["step"], run["loss"]) == (21, 2.5)


def test_a_run_itself_and_several_folders(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    assert Watched([str(first)]).state()["order"] == ["run"]
    state = Watched([str(first), str(tmp_path / "b"), str(second)]).state()
    assert state["order"] == ["a/run", "b/run"]


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: no such run directory or file"),
        (["empty"], "empty: there is no run in it, expected the directory of a run or of a grid"),
        (["file"], "file is a file, expected the directory of a run, or of runs"),
        (["runs", "--port", "70000"], "--port is 70000, expected a number from 0 to 65535"),
        (["runs", "--once", "page.txt"], "--once is page.txt, expected a name ending in .html or"),
        (["runs", "--once", "file/page.html"], "file is a file; expected a folder there"),
    ],
)
def test_bad_input_is_one_sentence(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    make_run(tmp_path / "runs")
    with pytest.raises(UserError, match=re.escape(message)):
        main(["watch", *words])


def test_the_page_in_one_file(tmp_path, capsys):
    folder = tmp_path / "runs"
    names = [name for name in NAMES if "/" not in name]
    for name in names:
        make_run(folder, name, ["warning: </script><script>alert(1)</script>"])
    out = tmp_path / "new/page.html"
    assert main(["watch", str(folder), "--once", str(out)]) == 0
    assert capsys.readouterr().out == f"written to {out}\n"
    html = out.read_text()
    assert html.count("</script>") == html.count("<script") == 2
    assert "src=" not in html
    assert "/*" not in html.split("<script")[0].split("<style>")[1]
    (held,) = re.findall(r'<script type="application/json" id="state">(.*?)</script>', html)
    state = json.loads(held)
    assert sorted(state["order"]) == sorted(names)
    assert main(["watch", str(folder), "--once", str(out.with_suffix(".json"))]) == 0
    again = json.loads(out.with_suffix(".json").read_text())
    assert again["runs"] == state["runs"]
    assert "warning: </script><script>alert(1)</script>" in texts(state["runs"][0])
