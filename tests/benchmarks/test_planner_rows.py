"""The published measurements as runs to plan, and the search for constants on them."""

import csv
import dataclasses

import numpy as np
import pytest

from benchmarks import planner_calibration as calibration
from benchmarks.planner_rows import DATA, read_kernels, read_runs
from pretrain.common.errors import UserError
from pretrain.model.counts import count_model


def test_every_row_is_a_run_or_left_out_with_a_reason():
    runs, left = read_runs()
    lines = (DATA / "throughput.csv").read_text().splitlines()[1:]
    assert len(runs) + len(left) == len(lines) and all(left.values())
    assert {run.id for run in runs}.isdisjoint(left)
    kernels, kernels_left = read_kernels()
    lines = (DATA / "kernel_times.csv").read_text().splitlines()[1:]
    assert len(kernels) + len(kernels_left) == len(lines)


def test_models_have_the_parameters_of_their_rows():
    published = {
        row["id"]: float(row["parameters"]) for row in calibration_rows() if row["parameters"]
    }
    runs, _ = read_runs()
    for run in runs:
        counted = count_model(run.config.model, run.vocab_size, 1).parameters
        if run.id in published:
            model, seq_len = run.config.model, run.config.train.seq_len
            learned = seq_len * model.hidden_size if run.source == "mpt" else 0
            # fla's parameters are of layers with other gates; mixtures' are rounded to billions.
            tolerance = 0.03 if run.source in ("mpt", "kempner", "titan") else 0.06
            assert counted + learned == pytest.approx(published[run.id], rel=tolerance), run.id


def calibration_rows():
    with (DATA / "throughput.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_what_cannot_be_read_names_row_and_column(tmp_path):
    header = (DATA / "throughput.csv").read_text().splitlines()[0]
    good = calibration_rows()[0]
    path = tmp_path / "throughput.csv"
    path.write_text("\n".join([header, ",".join(f'"{v}"' for v in good.values())]))
    assert len(read_runs(path)[0]) == 1
    good["micro_batch"] = "eight"
    path.write_text("\n".join([header, ",".join(f'"{v}"' for v in good.values())]))
    with pytest.raises(UserError, match="line 2, micro_batch: 'eight', expected a number"):
        read_runs(path)


def test_constants_that_made_speeds_are_found_again():
    """Runs whose speeds the planner itself gave with other constants."""
    runs = [run for run in read_runs()[0] if run.id in ("mpt-013", "mpt-016", "mpt-041", "mpt-052")]
    assert len(runs) >= 3
    true = calibration.Constants(
        {
            ("h100", "matmul_efficiency"): 0.5,
            ("hopper", "flash1"): 0.3,
            ("all", "overlap_cost"): 0.4,
        }
    )
    fitting = calibration.Calibration(runs, [])
    made = [
        dataclasses.replace(run, tokens_per_second=run.tokens_per_second * float(np.exp(ratio)))
        for run, ratio in zip(runs, fitting.run_ratios(true, runs), strict=True)
    ]
    found = calibration.Calibration(made, []).fit()
    assert found.values["h100", "matmul_efficiency"] == pytest.approx(0.5, rel=0.02)
    assert found.values["hopper", "flash1"] == pytest.approx(0.3, rel=0.03)
