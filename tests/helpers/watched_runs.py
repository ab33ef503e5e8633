"""Run directories as they look while runs train, for what follows them."""

from __future__ import annotations

import json

from tests.helpers.scaling_runs import run_directory

START = "2026-03-01T12:00:00"


def rows(steps, first=1, speed=1000.0, loss=None):
    return [
        {
            "step": step,
            "tokens": step * 128,
            "loss": 3 + 3 / step if loss is None else loss(step),
            "tokens_per_second": speed,
            "seconds": step * 0.128,
            "goodput": 0.5,
        }
        for step in range(first, steps + 1)
    ]


def add_rows(directory, new):
    with (directory / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in new))


def make_run(folder, name="run", lines=(), started=True, data=None, **config):
    folder.mkdir(parents=True, exist_ok=True)
    directory = run_directory(folder, rows(20), name, data={"path": "nowhere"}, **config)
    (directory / "log.txt").write_text("".join(f"2026-03-01 12:00:01 {line}\n" for line in lines))
    if started:
        start = {"time": f"{START}+0000", "step": 0, "seconds_before": 0.0}
        (directory / "starts.jsonl").write_text(json.dumps(start) + "\n")
    return directory
