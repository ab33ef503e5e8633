"""The time of a run over its starts: what each has logged, once."""

from __future__ import annotations

import json
import random

import pytest

from pretrain.run_directory import RunDirectory
from pretrain.run_time import add_start, count_starts, read_starts, total_seconds


class Simulation:
    """A run that is killed and resumed: its files, and the seconds that were logged."""

    def __init__(self, folder, *, old=False):
        self.run, self.old, self.logged, self.step = RunDirectory(folder), old, 0.0, 0
        self.log = ""

    def start(self, checkpoint, rows):
        """Resume after ``checkpoint``, log ``rows`` of (step, seconds), and be killed."""
        before = 0.0 if self.old else add_start(self.run, checkpoint)
        kept = self.run.read_metrics() if self.run.metrics_file.exists() else []
        kept = [row for row in kept if row["step"] <= checkpoint]
        for step, seconds in rows:
            row = {"step": step, "tokens": step, "loss": 1.0, "seconds": seconds}
            kept.append(row if self.old else {**row, "total_seconds": before + seconds})
        self.run.write_metrics(kept)
        if checkpoint:
            self.log += f"2026-01-01 00:00:00 resumed from a/step-{checkpoint:08d}\n"
        self.run.log_file.write_text(self.log)
        self.logged += rows[-1][1] if rows else 0.0

    def total(self):
        return total_seconds(self.run, self.run.read_metrics())


def test_starts_that_log_one_line_each_are_added_up(tmp_path):
    """Their clocks never fall, so the metrics alone look like one start."""
    for old in (False, True):
        folder = tmp_path / str(old)
        folder.mkdir()
        run = Simulation(folder, old=old)
        for number in range(5):
            run.start(10 * number, [(10 * (number + 1), 101.0 + number)])
        assert run.total() == pytest.approx([101, 203, 306, 410, 515])
        assert count_starts(run.run) == 5


@pytest.mark.parametrize("seed", range(20))
def test_what_killed_starts_have_logged_counts_once(tmp_path, seed):
    generator = random.Random(seed)
    run, step = Simulation(tmp_path), 0
    for _ in range(generator.randint(1, 8)):
        checkpoint = generator.randint(0, step) if step else 0
        seconds, rows, step = 0.0, [], checkpoint
        for _ in range(generator.randint(0, 6)):
            seconds += generator.uniform(0.1, 50)
            step += generator.randint(1, 5)
            rows.append((step, seconds))
        run.start(checkpoint, rows)
        known = [seconds for seconds in run.total() if seconds is not None]
        assert known == sorted(known)
        if rows:
            assert known[-1] == pytest.approx(run.logged, abs=0.01)
    run.start(step, [(step + 1, 1.0)])
    assert run.total()[-1] == pytest.approx(run.logged, abs=0.01)


def test_a_run_of_an_earlier_version_goes_on(tmp_path):
    run = Simulation(tmp_path, old=True)
    run.start(0, [(5, 50.0), (10, 100.0)])
    run.start(10, [(15, 120.0)])
    run.old = False
    run.start(15, [(20, 30.0)])
    assert run.total() == pytest.approx([50, 100, 220, 250])
    assert read_starts(run.run)[0]["seconds_before"] == pytest.approx(220)
    assert count_starts(run.run) == 3


def test_damaged_lines_are_left_out(tmp_path):
    run = RunDirectory(tmp_path)
    add_start(run, 0)
    with run.starts_file.open("a") as file:
        file.write('[]\n{"seconds_before": "x"}\n{"time": 1, "se')
    assert len(read_starts(run)) == 1
    assert json.loads(run.starts_file.read_text().splitlines()[0])["step"] == 0
