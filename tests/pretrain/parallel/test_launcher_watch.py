"""torchrun that is killed before its processes have met: they end, with one sentence."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests.helpers.processes import ENVIRONMENT, ROOT, TORCHRUN
from tests.helpers.training_run import Run

WATCH = """
import os, time
from pretrain.parallel import launcher_watch
launcher_watch._ANSWER_SECONDS = 2.0
launcher_watch.watch_launcher()
time.sleep({met})
launcher_watch.processes_met()
print("met", flush=True)
time.sleep({after})
print("done")
"""


def watch(*, met=0.5, after=0.0, parent="", **variables):
    """Output of a process that watches its launcher, which is this one or a shell that ends."""
    code = WATCH.format(met=met, after=after)
    command = [sys.executable, "-c", code]
    if parent:  # the shell starts it and ends: "sleep" says when
        command = ["sh", "-c", '"$0" -c "$1" & sleep "$2"', sys.executable, code, parent]
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("TORCHELASTIC")}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**environment, "LOCAL_RANK": "0", **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
        timeout=100,
    )
    return done.stdout


@pytest.fixture
def port():
    """A port at which nothing listens, and one at which something does."""
    with socket.socket() as taken, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield {"free": free.getsockname()[1], "taken": taken.getsockname()[1]}


def agent_store(port):
    return {
        "TORCHELASTIC_RUN_ID": "x",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.mark.slow
def test_a_launcher_that_goes_ends_the_process_until_all_have_met(port):
    store = agent_store(port["taken"])
    words = "error: torchrun has ended before its processes had met; start it again\n"
    assert watch(met=60, parent="2", **store) == words
    assert watch(met=60, parent="2", TORCHELASTIC_RUN_ID="x") == words
    # Afterwards the watchdog of the run sees it.
    assert watch(met=0, after=5, parent="3", **store) == "met\ndone\n"


def test_a_launcher_that_was_gone_before_is_noticed_by_its_store(port):
    found = watch(met=60, **agent_store(port["free"]))
    assert found.startswith("error: torchrun does not answer: it has ended")
    assert watch(**agent_store(port["taken"])) == "met\ndone\n"


def test_others_than_torchrun_may_start_a_process_and_end():
    assert watch(met=4, parent="1", RANK="0", MASTER_PORT="1") == "met\ndone\n"


@pytest.mark.slow
def test_processes_of_a_killed_torchrun_end_while_they_import(tmp_path, corpus):
    run = Run(tmp_path, corpus, "orphans")
    launcher = subprocess.Popen(
        [*TORCHRUN, "2", "-m", "pretrain", str(run.config)],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    workers: list[psutil.Process] = []
    while len(workers) < 2:
        workers = [c for c in psutil.Process(launcher.pid).children() if "RANK" in c.environ()]
        time.sleep(0.01)
    os.kill(launcher.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(workers, timeout=60)
    for process in alive:
        process.kill()
    output, _ = launcher.communicate(timeout=60)
    assert not alive, output
    assert output.count("error: torchrun") == 1, output
    assert not run.directory.exists()
