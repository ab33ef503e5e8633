"""``python -m launch`` on this machine: real runs, stopped, failed, retried and left out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from launch.__main__ import main
from pretrain.common.errors import UserError
from tests.helpers.processes import ENVIRONMENT, ROOT
from tests.helpers.small_grid import GRID, SETTINGS

pytestmark = pytest.mark.slow
CONFIG = f"""{SETTINGS}checkpoint: {{{{every: 2}}}}
logging: {{{{every: 1}}}}
sample: {{{{tokens: 0}}}}
{GRID}"""


@pytest.fixture
def launch(capsys):
    """The command in this process; the runs are processes of their own."""

    def call(*arguments):
        try:
            status = main([str(a) for a in arguments])
        except UserError as error:
            return 2, str(error)
        except SystemExit as ended:
            return ended.code, capsys.readouterr().err
        return status, capsys.readouterr().out

    return call


def write(folder, corpus, **changes):
    path = folder / "grid.yaml"
    text = CONFIG.format(folder=folder, data=corpus)
    for old, new in changes.items():
        text = text.replace(old, new)
    path.write_text(text)
    return path


def states(output):
    """{member: state} of the last table."""
    rows = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in rows if row[2].strip()}


def test_a_grid_from_nothing_to_done(tmp_path, corpus, launch):
    path = write(tmp_path, corpus)
    status, output = launch(path, "--dry-run")
    assert (status, "would start 4 of 4" in output) == (0, True)
    assert not (tmp_path / "runs").exists()

    status, output = launch(path, "--at-once", 2)
    assert status == 0, output
    assert set(states(output).values()) == {"done"}
    for member in ("pattern=gdn,seed=0", "pattern=attn,seed=1"):
        assert f"{member}: done" in output
        folder = tmp_path / "runs" / member
        launched = json.loads((folder / "launch.json").read_text())
        assert launched["status"] == 0 and launched["command"][-1] == str(folder / "launch.yaml")
        assert "step 4/4" in (folder / "output.txt").read_text()
    times = [json.loads(p.read_text()) for p in (tmp_path / "runs").glob("*/launch.json")]
    overlaps = sum(
        a["started"] < b["started"] < a["ended"] for a in times for b in times if a is not b
    )
    assert 1 <= overlaps <= 3, "two at a time"

    status, output = launch(path)
    assert (status, "nothing to start" in output) == (0, True)
    again = ("eval.limit=3", "validation.tokens=64", "sample.tokens=1", "logging.every=2")
    status, output = launch(path, *again)
    assert (status, "nothing to start" in output) == (0, True), output
    status, output = launch("logs", tmp_path / "runs/pattern=gdn,seed=0", "--follow")
    assert (status, "step 4/4" in output) == (0, True)
    # One more value: only its members are run.
    more = write(tmp_path, corpus, **{"seed: [0, 1]": "seed: [0, 1, 2]"})
    status, output = launch(more, "--dry-run")
    assert "would start 2 of 6" in output
    status, output = launch("status", more)
    assert sorted(states(output).values()) == ["done"] * 4 + ["waiting"] * 2

    status, output = launch(path, "optimizer.lr=0.5")
    assert status == 2
    assert "holds a run with other settings: optimizer.lr is 0.001 there and 0.5 here" in output


def test_a_run_directory_is_enough(tmp_path, corpus, launch):
    path = write(tmp_path, corpus, **{"  model.pattern: [gdn, attn]\n": "", "[0, 1]": "[0]"})
    assert launch(path)[0] == 0
    status, output = launch(
        tmp_path / "runs", f"directory={tmp_path}/again", "name=again", "--force"
    )
    assert status == 0, output
    losses = [
        [
            row["loss"]
            for row in map(json.loads, (p / "metrics.jsonl").read_text().splitlines())
            if "loss" in row
        ]
        for p in (tmp_path / "runs", tmp_path / "again")
    ]
    assert losses[0] == losses[1]
    commands = [
        json.loads((tmp_path / p / "launch.json").read_text())["command"] for p in ("runs", "again")
    ]
    assert [command[-1] == "--force" for command in commands] == [False, True]


def test_measured_speeds_make_members_alike_in_time(tmp_path, corpus, launch):
    path = write(
        tmp_path,
        corpus,
        **{
            "  seed: [0, 1]": "  match: time",
            "steps: 4": "steps: 2000",
            "[gdn, attn]": '{one: "gdn", many: "12*gdn"}',
        },
    )
    status, output = launch("measure", path, "--steps", 4)
    assert (status, output.count("tokens/s")) == (0, 2)
    speeds = json.loads((tmp_path / "runs/throughput.json").read_text())
    assert speeds["pattern=one"] > speeds["pattern=many"] > 0
    status, output = launch(path, "--dry-run")
    assert (status, "time matched" in output) == (0, True)
    steps = 2000 * speeds["pattern=many"] / speeds["pattern=one"]
    assert f"0/{round(steps):,} " in output
    status, output = launch("cancel", path)
    assert "nothing is running or queued" in output
    assert "is a grid, expected one run directory" in launch("logs", path)[1]
    assert "has no output yet" in launch("logs", write(tmp_path, corpus, **{GRID: ""}))[1]


def test_failed_members_are_named_and_retried_when_asked(tmp_path, corpus, launch):
    """A learning rate that makes the loss infinite ends its member, not the others."""
    path = write(
        tmp_path,
        corpus,
        **{"  model.pattern: [gdn, attn]\n  seed: [0, 1]": "  optimizer.lr: [1e-3, 1e30]"},
    )
    status, output = launch(path)
    assert status == 1, output
    found = states(output)
    assert (found["lr=0.001"], found["lr=1e+30"]) == ("done", "failed")
    assert "lr=1e+30: failed" in output
    status, output = launch(path)
    assert status == 1
    assert "lr=1e+30 failed before" in output
    assert "add --retry-failed to start it again" in output
    status, output = launch(path, "--retry-failed", "--dry-run")
    assert "would start 1 of 2" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_saves_and_the_same_command_goes_on(tmp_path, corpus, launch, number):
    path = write(tmp_path, corpus, **{"steps: 4": "steps: 3000"})
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", str(path), "--at-once", "2"],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    directories = [tmp_path / f"runs/pattern=gdn,seed={s}" for s in (0, 1)]
    end = time.monotonic() + 90
    while time.monotonic() < end and process.poll() is None:
        if all(
            (d / "metrics.jsonl").exists() and (d / "metrics.jsonl").read_text().count("loss") > 3
            for d in directories
        ):
            break
        time.sleep(0.05)
    running = states(launch("status", path)[1])
    assert running["pattern=gdn,seed=0"] == "running"
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    found = states(launch("status", path)[1])
    assert found["pattern=gdn,seed=0"] == found["pattern=gdn,seed=1"] == "stopped"
    assert found["pattern=attn,seed=0"] == "waiting"
    assert all((d / "checkpoints/latest").exists() for d in directories)
    _, output = launch(path, "--dry-run")
    assert "would start 4 of 4" in output


def test_cancelling_a_grid_ends_its_queue_too(tmp_path, corpus, launch):
    path = write(
        tmp_path, corpus, **{"steps: 4": "steps: 30000", "  model.pattern: [gdn, attn]\n": ""}
    )
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch", str(path)], cwd=ROOT, env=ENVIRONMENT
    )
    metrics = tmp_path / "runs/seed=0/metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.05)
    status, output = launch("cancel", path)
    assert (status, "seed=0: asked to save and exit" in output) == (0, True)
    assert launcher.wait(60) == 75
    assert states(launch("status", path)[1]) == {"seed=0": "stopped", "seed=1": "waiting"}
    assert (tmp_path / "runs/seed=0/checkpoints/latest").exists()


def test_two_launchers_of_one_grid_share_its_members(tmp_path, corpus, launch):
    """Started at the same time, so that each sees all members waiting; none is started twice."""
    path = write(
        tmp_path,
        corpus,
        **{
            "  model.pattern: [gdn, attn]\n": "",
            "grid:\n": "callbacks: [tests.helpers.slow_steps.SlowSteps]\ngrid:\n",
            "steps: 4": "steps: 20",
        },
    )
    launchers = [
        subprocess.Popen(
            [sys.executable, "-m", "launch", str(path)],
            cwd=ROOT,
            env=ENVIRONMENT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "failed" not in "".join(outputs) and "Warning" not in "".join(outputs)
    for member in ("seed=0", "seed=1"):
        log = (tmp_path / "runs" / member / "log.txt").read_text()
        assert log.count(" parameters (") == log.count("step 20/20") == 1, "started once"
    assert set(states(launch("status", path)[1]).values()) == {"done"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}"], "is a folder without config.yaml"),
        (["{folder}/nothing.yaml"], "no config file at"),
        (["{config}", "parallel.tensor=1", "--processes", "999"], "needs 999 processes"),
        (["{config}", "--at-once", "0"], "expected a whole number from 1"),
        (["{config}", "directory={config}"], "is a file; expected a folder there"),
        (["{config}", "directory={config}/x", "--dry-run"], "is a file; expected a folder there"),
        (["{config}", "optimizer.lrr=1"], "unknown setting 'optimizer.lrr'"),
        (["{config}", "directory={data}/runs"], "is in the data set {data}, whose files"),
    ],
)
def test_bad_input(tmp_path, corpus, launch, arguments, message):
    config = write(tmp_path, corpus)
    names = {"folder": tmp_path, "config": config, "data": corpus}
    status, output = launch(*(a.format(**names) for a in arguments))
    assert status == 2
    assert message.format(**names) in output
    assert "Traceback" not in output
