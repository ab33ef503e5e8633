"""The published measurements as runs to plan, and the search for constants on them."""

import csv
import dataclasses

import numpy as np
import pytest

from benchmarks.planner_fit import Calibration, Constants
from benchmarks.planner_rows import DATA, read_kernels, read_runs
from pretrain.common.errors import UserError
from pretrain.model.counts import count_model
from pretrain.model.spec import block_specs


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


def test_models_have_as_many_blocks_as_their_rows_say():
    layers = {row["id"]: row["layers"] for row in calibration_rows()}
    for run in read_runs()[0]:
        assert len(block_specs(run.config.model)) == int(layers[run.id]), run.id


def calibration_rows(table="throughput.csv"):
    with (DATA / table).open(newline="") as file:
        return list(csv.DictReader(file))


def changed(tmp_path, table="throughput.csv", row_id="mpt-013", **cells):
    """Write a table of one row with other cells; None removes the column."""
    (row,) = (row for row in calibration_rows(table) if row["id"] == row_id)
    row = {key: value for key, value in {**row, **cells}.items() if value is not None}
    path = tmp_path / table
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    return path


@pytest.mark.parametrize(
    "column, text, expected",
    [
        ("micro_batch", "eight", "a positive number"),
        ("micro_batch", "1.5", "a whole number"),
        ("seq_len", "0", "a positive number"),
        ("tokens_per_second_per_gpu", "nan", "a positive number"),
        ("activation_checkpointing", "full", "one of: none, selective, block"),
        ("sharding", "zero4", "one of: none, zero1"),
        ("tied_embeddings", "maybe", "one of: false, true"),
    ],
)
def test_what_cannot_be_read_names_line_and_column(tmp_path, column, text, expected):
    assert len(read_runs(changed(tmp_path))[0]) == 1
    with pytest.raises(UserError, match=f"line 2, {column}: '{text}', expected {expected}"):
        read_runs(changed(tmp_path, **{column: text}))


def test_a_kernel_that_cannot_be_read_names_line_and_column(tmp_path):
    table, row_id = "kernel_times.csv", "gb200-001"
    with pytest.raises(UserError, match="line 2, ms: '-1', expected a positive number"):
        read_kernels(changed(tmp_path, table, row_id, ms="-1"))
    with pytest.raises(UserError, match="line 2, pass: 'up', expected one of: fwd, bwd"):
        read_kernels(changed(tmp_path, table, row_id, **{"pass": "up"}))


def test_other_columns_or_cells_than_the_table_has_are_refused(tmp_path):
    with pytest.raises(UserError, match="no column 'precision'"):
        read_runs(changed(tmp_path, precision=None))
    path = changed(tmp_path)
    path.write_text(path.read_text().rstrip() + ",a note, after all\n")
    with pytest.raises(UserError, match="line 2: more or fewer cells than the 33 columns"):
        read_runs(path)


def test_gpus_that_the_layout_does_not_divide_are_refused(tmp_path):
    with pytest.raises(UserError, match="num_gpus: 512, expected a multiple of tensor"):
        read_runs(changed(tmp_path, tensor="3"))


def test_models_that_this_project_does_not_have_are_left_out_with_the_reason(tmp_path):
    runs, left = read_runs(changed(tmp_path, mlp_kind="geglu"))
    assert not runs and "kind is 'geglu'" in left["mpt-013"]


def test_runs_that_say_too_little_to_judge_a_plan_by_are_told_apart(tmp_path):
    described = {run.id: run.described for run in read_runs()[0]}
    assert described["mpt-013"] and described["fla-003"]  # in full; its micro-batch is known
    assert not described["fla-005"] and not described["m2rnn-008"]
    assert not read_runs(changed(tmp_path, specified="part"))[0][0].described


def test_torchtitan_keeps_a_share_of_the_logits_on_each_tensor_parallel_gpu():
    logits = {run.id: run.software.logits_bytes for run in read_runs()[0]}
    assert logits["titan-020"] == logits["titan-002"] / 8


def test_memory_follows_from_what_a_program_keeps():
    """Whole gradients until a step's last micro-batch, everything else in shards."""
    runs = {run.id: run for run in read_runs()[0]}
    software = {name: runs[f"kempner-{name}"].software for name in ("001", "014")}
    kept = {name: (s.state_bytes, s.whole_gradients) for name, s in software.items()}
    assert kept == {"001": (8, 0), "014": (6, 4)}  # one GPU shards nothing
    assert runs["kempner-014"].memory == 93.2 * 2**30
    run = runs["kempner-014"]
    estimate, _ = Calibration([run], []).estimate(run, Constants())
    share = 70.55e9 / 4 / 8  # of the parameters, by tensor and data parallelism
    assert estimate.memory["weights"] == pytest.approx(6 * share, rel=0.01)
    assert estimate.memory["gradients"] == pytest.approx(4 * 8 * share, rel=0.01)
    assert estimate.peak_memory == pytest.approx(run.memory, rel=0.15)


def test_constants_that_made_speeds_are_found_again():
    """Runs whose speeds the planner itself gave with other constants."""
    runs = [run for run in read_runs()[0] if run.id in ("mpt-013", "mpt-016", "mpt-041", "mpt-052")]
    assert len(runs) >= 3
    true = Constants(
        {
            ("h100", "matmul_efficiency"): 0.5,
            ("hopper", "flash1"): 0.3,
            ("all", "overlap_cost"): 0.4,
        }
    )
    fitting = Calibration(runs, [])
    made = [
        dataclasses.replace(run, tokens_per_second=run.tokens_per_second * float(np.exp(ratio)))
        for run, ratio in zip(runs, fitting.run_ratios(true, runs), strict=True)
    ]
    found = Calibration(made, []).fit()
    assert found.values["h100", "matmul_efficiency"] == pytest.approx(0.5, rel=0.02)
    assert found.values["hopper", "flash1"] == pytest.approx(0.3, rel=0.03)
