"""How long a command takes to start: importing what training needs, and the demo's first steps.

    OMP_NUM_THREADS=1 python benchmarks/start_cpu.py [--data data/stdlib] [--times 5]

CPU seconds of an interpreter that imports torch alone, of one that imports the trainer, and of one
that imports the backend too, with megatron-core; then wall and CPU seconds of three steps of the
demo from the command to the prompt, in a run directory that is removed. Each is the least of
several, since other load on the machine only adds. The data is ``make demo``'s.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS = 3


def measure(*words: str) -> tuple[float, float]:
    """Return CPU and wall seconds of ``python WORDS``, its own processes included."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"python {' '.join(words)}: status {done.returncode}\n{done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to import and to start the demo.")
    parser.add_argument("--data", default="data/stdlib", help="prepared data, make demo's")
    parser.add_argument("--times", type=int, default=5, help="the least of so many")
    given = parser.parse_args()
    if not (ROOT / given.data / "manifest.json").exists():
        raise SystemExit(
            f"error: {given.data} holds no manifest.json: "
            f"run python -m data_prep configs/data/stdlib.yaml"
        )

    modules = (
        "torch",
        "pretrain.training.trainer",
        "pretrain.training.trainer, pretrain.optim.backends.megatron",  # all that a run imports
    )
    seconds: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(given.times):  # in turn, so that other load on the machine affects all
        for module in modules:
            seconds[module].append(measure("-c", f"import {module}")[0])
    least = {module: min(seconds[module]) for module in modules}
    for module, cpu in least.items():
        ratio = cpu / least["torch"]
        print(f"import {module:60s} {cpu:5.2f} CPU seconds, {ratio:.2f} x torch alone")

    walls = []
    for _ in range(given.times):
        with tempfile.TemporaryDirectory() as folder:
            overrides = (
                f"directory={folder}/run",
                f"data.path={given.data}",
                f"train.steps={STEPS}",
                "schedule.warmup_steps=1",
                "sample.tokens=0",
            )
            walls.append(measure("-m", "pretrain", "configs/runs/demo.yaml", *overrides))
    print(
        f"{STEPS} steps of the demo: {min(w for _, w in walls):.1f} s by the clock, "
        f"{min(c for c, _ in walls):.1f} CPU seconds"
    )


if __name__ == "__main__":
    main()
