"""``python -m launch cancel``: the run's own process gets the signal, and no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from launch.__main__ import main
from launch.claims import claim, is_claimed
from launch.expansion import load_grid
from launch.local import run_queue
from launch.members import RUNNING, member_state
from pretrain.common.process_identity import identity_of, send_signal
from pretrain.run_directory import RunDirectory
from tests.helpers.processes import ENVIRONMENT, ROOT

CONFIG = """
name: r
directory: {folder}/run
model: {{hidden_size: 16, pattern: attn, vocab_size: 64, mixers: {{attn: {{num_heads: 1}}}}}}
data: {{path: nowhere}}
train: {{steps: 4, seq_len: 32, global_batch_tokens: 64}}
schedule: {{warmup_steps: 1}}
parallel: {{micro_batch_size: 2}}
"""
HOLDER = """
import sys, time
from pretrain.run_directory import RunDirectory
RunDirectory(sys.argv[1]).take_lock()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(CONFIG.format(folder=tmp_path))
    (tmp_path / "run").mkdir()
    return path


@pytest.fixture
def stranger():
    """A process that has nothing to do with any run."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def holder(tmp_path, config):
    """A process that holds the run's lock, as one that trains does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def launched(folder, **values):
    (folder / "run/launch.json").write_text(json.dumps(values))


def cancelled(config, capsys):
    assert main(["cancel", str(config)]) == 0
    return capsys.readouterr().out


def lives(process):
    time.sleep(0.1)
    return process.poll() is None


def test_the_process_that_holds_the_lock_is_stopped_and_no_stranger(
    tmp_path, config, holder, stranger, capsys
):
    """What launch.json says may be of an earlier start, by whoever has that id now."""
    launched(tmp_path, pid=stranger.pid, host=os.uname().nodename, started=1.0)
    assert "r: asked to save and exit" in cancelled(config, capsys)
    assert holder.wait(10) == -signal.SIGTERM
    assert lives(stranger)


@pytest.mark.parametrize("born", [None, 1.0, "now"])
def test_a_process_that_only_has_the_id_is_left_alone(
    tmp_path, config, holder, stranger, born, capsys
):
    """The lock's file may be older than its holder's note: on a full disk it is not written."""
    note = {"pid": stranger.pid, "host": os.uname().nodename, "born": born}
    (tmp_path / "run/.lock").write_text(json.dumps(note))
    assert "not asked, its process is not known" in cancelled(config, capsys)
    (tmp_path / "run/.lock").write_text(json.dumps({**identity_of(stranger.pid), "host": "other"}))
    assert "not asked, it runs on other: run this command there" in cancelled(config, capsys)
    (tmp_path / "run/.lock").write_text("not JSON")
    assert "not asked, its process is not known" in cancelled(config, capsys)
    assert lives(stranger)
    assert lives(holder)


def test_a_process_that_is_gone_is_no_error(tmp_path, config, stranger, capsys):
    values = identity_of(stranger.pid)
    stranger.kill()
    stranger.wait()
    launched(tmp_path, **values)
    assert "nothing is running or queued" in cancelled(config, capsys)
    held = claim(RunDirectory(tmp_path / "run"))
    assert held is not None
    assert "not asked, its process is not known" in cancelled(config, capsys)
    held.release()
    assert not send_signal(values, signal.SIGTERM)
    assert identity_of(values["pid"])["born"] is None


def test_a_run_that_has_just_been_launched_is_stopped_before_it_has_the_lock(
    tmp_path, config, stranger, capsys
):
    launched(tmp_path, **identity_of(stranger.pid))
    held = claim(RunDirectory(tmp_path / "run"))
    assert held is not None
    assert "r: asked to save and exit" in cancelled(config, capsys)
    assert stranger.wait(10) == -signal.SIGTERM
    held.release()


def test_one_launcher_at_a_time_has_a_run(tmp_path, config):
    directory = RunDirectory(tmp_path / "run")
    (member,) = load_grid(config).members
    assert not is_claimed(directory)
    held = claim(directory)
    assert held is not None
    assert claim(directory) is None
    assert is_claimed(directory)
    assert member_state(member).state == RUNNING
    held.release()
    assert not is_claimed(directory)
    again = claim(directory)
    assert again is not None
    again.release()


def test_what_another_launcher_has_come_to_is_passed_over(tmp_path, config, monkeypatch):
    """Members are looked at again before each is started; --retry-failed means earlier failures."""
    (member,) = load_grid(config).members
    directory = RunDirectory(tmp_path / "run")
    shown: list[str] = []

    class Started(Exception):
        """Instead of a run."""

    def start(*_):
        raise Started

    monkeypatch.setattr("launch.local._start", start)

    def queue():
        return run_queue(
            [member], at_once=1, processes=None, show=lambda _, what: shown.append(what)
        )

    held = claim(directory)
    assert held is not None
    assert queue() == {"": 0}
    held.release()
    directory.write_launch(status=1, reason="x", ended=time.time() + 60)
    assert queue() == {"": 1}
    assert shown == [
        "left to another launcher, which is running it",
        "failed under another launcher",
    ]
    directory.write_launch(ended=time.time() - 60)
    with pytest.raises(Started):
        queue()


@pytest.mark.parametrize(("named", "ends"), [(["a", "b", "c"], True), (["a", "b"], False)])
def test_the_launcher_ends_only_where_all_of_its_grid_is_cancelled(
    tmp_path, stranger, capsys, named, ends
):
    grid = tmp_path / "grid"
    for name in "abc":
        directory = RunDirectory(grid / name)
        directory.path.mkdir(parents=True)
        text = CONFIG.format(folder=tmp_path).replace(f"{tmp_path}/run", str(directory))
        (grid / f"{name}.yaml").write_text(text)
        directory.write_launch_config(load_grid(grid / f"{name}.yaml").members[0].config)
        directory.write_launch(launcher=identity_of(stranger.pid))
    (grid / "grid.json").write_text(json.dumps({"members": list("abc")}))
    assert main(["cancel", *(str(grid / name) for name in named)]) == 0
    if ends:
        assert stranger.wait(10) == -signal.SIGTERM
    else:
        assert lives(stranger)
