"""One of several processes raises, hangs, stops or is killed: all end and nothing is lost."""

from __future__ import annotations

import random
import re
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pretrain.checkpoint.state import check_files
from pretrain.checkpoint_folders import list_checkpoints
from tests.helpers.processes import ENVIRONMENT, ROOT, TORCHRUN
from tests.helpers.training_run import STEPS, Run

TWO_PROCESSES = [*TORCHRUN, "2"]
LAYOUT = ["parallel.pipeline=2", "parallel.timeout_minutes=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("failing")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "raises",
            "process 1 of 2 on .* failed at reading the data of step 8: ZeroDivisionError: "
            "a reason .traceback in .*failure.txt.",
        ),
        ("killed", "process 1 of 2 died at .*step [78]: it was killed, or its machine went down"),
        (
            "hangs",
            "process 1 of 2 has been at reading the data of step 8 for .* s, longer than "
            "parallel.timeout_minutes",
        ),
        (
            "stops",
            "nothing has been heard of process 1 of 2 for .* s: it has stopped, or its machine has",
        ),
    ],
)
def test_one_process_that_fails_ends_all_with_one_message(kind, message, folder, corpus):
    run = Run(folder, corpus, f"failing-{kind}")
    done = subprocess.run(
        [
            *TWO_PROCESSES,
            "-m",
            "tests.helpers.failing_run",
            kind,
            str(run.config),
            "parallel.timeout_minutes=0.25",
        ],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=False,
        timeout=150,
    )
    assert done.returncode != 0
    errors = [x for x in done.stderr.splitlines() if x.startswith("error:")]
    assert len(errors) == 1, done.stderr
    # That of step 6 may still have been on its way to the disk.
    found = re.fullmatch(f"error: {message}; the last checkpoint is (.*-0000000[36])", errors[0])
    assert found, errors[0]
    last = Path(found.group(1))
    check_files(last)
    if kind == "killed":  # the run resumes
        status, output = run.finish()
        assert status == 0
        assert f"resumed from {last}" in output


def start(run):
    """The launcher, and its two processes by rank."""
    launcher = subprocess.Popen(
        [*TWO_PROCESSES, "-m", "pretrain", str(run.config), *LAYOUT],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    workers: dict[int, psutil.Process] = {}
    while len(workers) < 2 and launcher.poll() is None:
        for child in psutil.Process(launcher.pid).children():
            rank = child.environ().get("RANK")
            if rank is not None:
                workers[int(rank)] = child
        time.sleep(0.01)
    return launcher, workers


@pytest.mark.slow
def test_whichever_process_is_killed_checkpoints_are_whole_or_absent(folder, corpus):
    """A stage of a pipeline, at random moments and while a checkpoint is being written."""
    expected = Run(folder, corpus, "undisturbed")
    launcher, _ = start(expected)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    run, chance = Run(folder, corpus, "disturbed"), random.Random(1)
    checkpoints = run.directory / "checkpoints"

    def writing(step):
        return lambda: any(checkpoints.glob(f".writing-step-{step:08d}*/*"))

    def steps_done(count):
        return lambda: len(run.losses) >= count

    for rank, moment in (
        (0, writing(6)),
        (chance.randint(0, 1), steps_done(chance.randint(7, 9))),
        (1, writing(12)),
    ):
        launcher, workers = start(run)
        run.wait_until(launcher, moment)
        workers[rank].kill()
        output, _ = launcher.communicate(timeout=90)
        assert launcher.returncode != 0
        if "step " in output:
            assert output.count("error: ") == 1, output
        for path in list_checkpoints(checkpoints):
            check_files(path)
    launcher, _ = start(run)
    output, _ = launcher.communicate(timeout=120)
    assert launcher.returncode == 0, output
    assert f"step {STEPS}/{STEPS}" in output
    assert run.losses == expected.losses
