"""What the planner says of a case, and what processes measure, each in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess

from tests.helpers.processes import ROOT, TORCHRUN, run


def plan(cases):
    done = run("tests.helpers.planner_worker", text=json.dumps(cases).encode())
    assert done.returncode == 0, done.stderr
    line = next(x for x in done.stdout.splitlines() if x.startswith("planned "))
    return json.loads(line.removeprefix("planned "))


def measure(names, processes=2):
    """Bytes of each of the processes, by case."""
    # Memory that is let go goes back to the system at once, so that its count is of what is used.
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_ARENA_MAX": "2",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [*TORCHRUN, str(processes), "-m", "tests.helpers.memory_worker", *names],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(x for x in done.stdout.splitlines() if x.startswith("measured "))
    return json.loads(line.removeprefix("measured "))
