"""A full disk, a run directory that is removed, a screen that is gone: one sentence, or go on."""

from __future__ import annotations

import contextlib
import errno
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from pretrain.common.errors import UserError
from pretrain.common.files import LinesFile, write_bytes
from pretrain.training.callbacks import Callback
from pretrain.training.trainer import Trainer
from tests.helpers.processes import ENVIRONMENT, ROOT
from tests.helpers.training_run import QUICK, STEPS, Run, whole_lines

STRICT = (*QUICK, "checkpoint.retries=0")
FILLED = ("callbacks=[tests.helpers.fill_disk.FillDisk]", "checkpoint.every=100")


@contextlib.contextmanager
def small_disk(folder, size):
    if os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs needs root")
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("this system lets no tmpfs be mounted")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes", "message"),
    [
        ("8k", (), "cannot write .*(config.yaml|environment.json)"),  # before the start
        ("4m", FILLED, "cannot write .*(metrics.jsonl|log.txt)"),  # between saves
        ("200k", (), "cannot write checkpoint"),
        ("1m", ("model.hidden_size=96",), "cannot write checkpoint"),
    ],
)
def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path, corpus, size, changes, message):
    with small_disk(tmp_path / "disk", size) as disk:
        run = Run(tmp_path, corpus, "full", directory=disk / "run")
        run.directory = disk / "run"
        overrides = (*changes, "sample.tokens=0", "checkpoint.retries=0")
        status, output = run.finish(*overrides)
        (line,) = [x for x in output.splitlines() if x.startswith("error: ")]
        assert status == 2, output
        assert "Traceback" not in output
        assert re.match(f"error: {message}", line)
        assert "No space left on device (0 MB free there)" in line, output
        left = [p.name for p in run.directory.rglob(".*") if p.name != ".lock"]
        assert left in ([], [".metadata"])  # of a checkpoint
        for whole in (disk / "run" / "checkpoints").glob("step-*"):
            assert (whole / "files.json").exists()
        # With room the same command goes on.
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        status, output = run.finish(*overrides)
        assert status == 0, output
        assert [row["step"] for row in run.metrics if "loss" in row] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
@pytest.mark.usefixtures("no_groups")
def test_a_line_that_cannot_be_written_ends_the_run_with_one_error(run, monkeypatch, number, name):
    class Refuse(Callback):
        def before_step(self):
            if self.trainer.state.step == 2:
                monkeypatch.setattr(LinesFile, "write", refuse)

    def refuse(self, line):
        if self._path.name == name:
            raise OSError(number, os.strerror(number), str(self._path))

    with pytest.raises(UserError, match=f"cannot write .*{name}: {os.strerror(number)}") as error:
        Trainer(run.config, overrides=STRICT, callbacks=[Refuse()]).fit()
    assert ("MB free" in str(error.value)) == (number == errno.ENOSPC)
    assert error.value.__suppress_context__
    assert "the last checkpoint is" in str(error.value)


def test_a_file_that_cannot_be_written_is_named_and_left_as_it_was(tmp_path):
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "file"
        write_bytes(path, b"old")
        with pytest.raises(OSError, match="No space left") as error:
            write_bytes(path, bytes(100_000))
        assert error.value.filename == str(path)
        assert path.read_bytes() == b"old"
        assert [p.name for p in disk.iterdir()] == ["file"]
        lines = LinesFile(disk / "lines")
        lines.write("whole")
        with pytest.raises(OSError, match="No space left") as error:
            lines.write("x" * 100_000)
        lines.close()
        assert error.value.filename == str(disk / "lines")
        assert (disk / "lines").read_bytes().startswith(b"whole\nxxx")


@pytest.mark.usefixtures("no_groups")
@pytest.mark.parametrize("replaced", [False, True])
def test_a_run_directory_that_is_removed_is_noticed_at_the_next_save(run, replaced):
    class Remove(Callback):
        def before_step(self):
            if self.trainer.state.step == 2:
                self.trainer.writer.wait()
                shutil.rmtree(run.directory)
                if replaced:
                    other.run_directory.take_lock()

    other = Trainer(run.config, overrides=QUICK)
    trainer = Trainer(run.config, overrides=STRICT, callbacks=[Remove()])
    what = "was replaced by another" if replaced else "was removed"
    with pytest.raises(UserError, match=f"the run directory .* {what} while the run was training"):
        trainer.fit()
    assert trainer.state.step == 4
    other.run_directory.release_lock()
    assert not (run.directory / "checkpoints").exists()


def start(run, redirect, *overrides, quiet=True):
    """The command in a shell, its standard output redirected; errors come through a pipe."""
    words = ["-m", "pretrain", str(run.config), *(QUICK if quiet else ()), *overrides]
    command = ["sh", "-c", f'"$0" "$@" {redirect}', sys.executable, *words]
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=300
    )


@pytest.mark.slow
@pytest.mark.parametrize("redirect", [">/dev/full", ">&-", ">DISK/out", "| head -1"])
def test_a_run_goes_on_without_its_standard_output(tmp_path, corpus, redirect):
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "fill").write_bytes(bytes(4096))
        run = Run(tmp_path, corpus, "run", steps=4)
        done = start(run, redirect.replace("DISK", str(disk)))
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in run.metrics if "loss" in row] == [1, 2, 3, 4]
    log = (run.directory / "log.txt").read_text()
    assert log.count("standard output cannot be written to: ") == 1
    assert "loss curve" in log and "step 4/4" in log
    (line,) = done.stderr.splitlines()
    assert "training goes on, its log is" in line


@pytest.mark.slow
def test_a_command_whose_output_is_lost_says_so_in_one_sentence(tmp_path):
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    with small_disk(tmp_path / "disk", "4k") as disk:
        (disk / "fill").write_bytes(bytes(4096))
        for redirect, reason in (
            (">/dev/full", "No space left on device"),
            (f">{disk}/out", "No space left on device"),
            (">&-", "Bad file descriptor"),
        ):
            for variables in ({}, {"PYTHONUNBUFFERED": "1"}):
                done = subprocess.run(
                    ["sh", "-c", f"{sys.executable} -m pretrain layers {redirect}"],
                    cwd=ROOT,
                    env={**environment, **variables},
                    text=True,
                    capture_output=True,
                    check=False,
                    timeout=300,
                )
                assert done.returncode == 1
                expected = f"error: standard output cannot be written to: {reason}\n"
                assert done.stderr == expected, redirect


@pytest.mark.slow
def test_a_closed_terminal_saves_the_run(tmp_path, corpus):
    """SIGHUP, and a screen that takes nothing any more."""
    run = Run(tmp_path, corpus, "run", steps=2000)
    master, slave = pty.openpty()

    command = [sys.executable, "-m", "pretrain", str(run.config), "checkpoint.every=1000"]
    process = subprocess.Popen(
        ["setsid", "--ctty", *command],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    os.set_blocking(master, False)
    end = time.monotonic() + 120
    while len(whole_lines(run)) < 3 and process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(OSError):
            os.read(master, 10_000)
        time.sleep(0.01)
    os.close(master)
    assert process.wait(120) == 75
    log = (run.directory / "log.txt").read_text()
    assert "stopped by SIGHUP" in log
    stopped = run.metrics[-1]["step"]
    assert (run.directory / f"checkpoints/step-{stopped:08d}/files.json").exists()


@pytest.mark.usefixtures("no_groups")
@pytest.mark.parametrize("ignored", [False, True])
def test_an_ignored_sighup_stays_ignored(run, ignored):
    """As nohup has it."""

    class HangUp(Callback):
        def before_step(self):
            if self.trainer.state.step == 1:
                os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        result = Trainer(run.config, overrides=QUICK, callbacks=[HangUp()]).fit()
        assert result.step == (4 if ignored else 2)
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)
