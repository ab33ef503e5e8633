"""Laws of tables of runs: outliers, repeated data, experts, tasks, other losses, sweeps."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pandas
import pytest

from benchmarks.scaling_laws import CURVES, FITTED, grid_of_runs, read, true_fit
from benchmarks.scaling_tables import FINAL, LADDER
from evals.scaling import (
    Fit,
    Options,
    Pairs,
    Points,
    RunTable,
    bootstrap,
    curve_law,
    fit,
    fit_downstream,
    fit_powers,
    interval,
    loss_to_loss_law,
    optima_of,
    read_points,
    robust_fit,
    size_law,
)
from evals.scaling.allocation import best_allocation
from evals.scaling.commands import main
from evals.scaling.downstream import sigmoid
from evals.scaling.extrapolating import refuse_undetermined
from evals.scaling.fitting import Problem
from evals.scaling.intervals import mape
from evals.scaling.outliers import rising
from evals.scaling.planning import best_size_and_schedule
from evals.scaling.point_intervals import point_interval
from evals.scaling.repeated_data import worth_of
from pretrain.common.errors import UserError

# The five rows with the highest losses of the public extraction of Chinchilla's figure 4
# (github.com/epoch-research/analyzing-chinchilla): models far too large for their few tokens.
EARLY = (
    (6.7956e9, 2.45106e8, 5.005582),
    (2.979521e9, 5.161647e8, 4.665232),
    (2.638631e9, 6.160421e8, 3.765563),
    (2.282804e9, 7.025502e8, 3.793872),
    (2.006673e9, 8.116029e8, 3.446995),
)


def with_early_runs(seed):
    """Runs of Chinchilla's law whose noise has heavy tails, and the five rows."""
    points = grid_of_runs()
    noise = 0.0035 * np.random.default_rng(seed).laplace(size=len(points.loss))
    n, d, loss = np.array(EARLY).T
    return Points(
        np.append(points.parameters, n),
        np.append(points.tokens, d),
        np.append(points.loss * np.exp(noise), loss),
    )


@pytest.mark.slow
def test_high_losses_from_early_in_training_are_named():
    points = with_early_runs(0)
    law = size_law("chinchilla", points)
    found, outliers, left = robust_fit(law, points)
    assert [o.name for o in outliers] == [f"run {i}" for i in range(241, 246)]
    assert len(left.loss) == 240
    assert all(o.error > 0.05 for o in outliers)
    assert found.values["beta"] == pytest.approx(0.366, abs=0.01)


@pytest.mark.parametrize("count", [20, 40, pytest.param(120, marks=pytest.mark.slow)])
def test_planted_outliers_are_named_and_no_others(count):
    generator = np.random.default_rng(count)
    points = grid_of_runs(0.003, 5)
    points = points.only(generator.choice(240, count, replace=False))
    law = size_law("chinchilla", points)
    assert robust_fit(law, points)[1] == []
    bad = np.sort(generator.choice(count, 5 if count > 20 else 2, replace=False))
    points.loss[bad] *= np.exp(np.resize([0.05, -0.04, 0.08, -0.06, 0.1], len(bad)))
    _, outliers, left = robust_fit(law, points)
    assert [o.name for o in outliers] == [points.names[i] for i in bad]
    assert len(left.loss) == count - len(bad)


def test_few_runs_name_no_outliers():
    points = grid_of_runs(0.003).only(range(0, 240, 17))
    points.loss[3] *= 1.2
    assert robust_fit(size_law("chinchilla", points), points)[1] == []


@pytest.mark.slow
def test_repetition_has_the_published_values_worth():
    """Eq. 5 and 6 of arXiv 2305.16264 by themselves, and R_D and R_N found again from noise."""
    unit, whole = np.log([2.0, 3.0]), np.log([8.0, 2.5])
    worth, *_ = worth_of(unit, whole, 15.39)
    assert np.exp(worth[0]) == pytest.approx(2 * (1 + 15.39 * (1 - np.exp(-3 / 15.39))))
    assert np.exp(worth[1]) == pytest.approx(2.5)
    truth, (points,) = true_fit("data_constrained")
    noise = np.random.default_rng(0).standard_normal(len(points.loss))
    unique = np.resize([1e8, 1e9, 1e10, 1e12], len(points.loss))
    points = replace(points, unique_tokens=np.minimum(points.tokens, unique))
    noisy = replace(points, loss=truth.predict(points) * np.exp(5e-4 * noise))
    found = fit(truth.law, [noisy], Options("log", priors=False))
    assert found.values["R_D"] == pytest.approx(15.39, rel=0.15)
    assert found.values["R_N"] == pytest.approx(5.31, rel=0.15)


def test_runs_that_further_epochs_harmed_are_named():
    points = Points(
        np.full(4, 1e8),
        np.array([1e9, 4e9, 4e10, 4e10]),
        np.array([3.5, 3.2, 3.6, 3.1]),
        np.array([1e9, 1e9, 1e9, 4e10]),
        names=["a", "b", "c", "d"],
    )
    (found,) = rising(points)
    assert (found.name, found.error) == ("c", pytest.approx(0.125))
    assert "above b" in found.why


def test_scarce_data_asks_for_smaller_models_than_endless_data():
    truth, (points,) = true_fit("data_constrained")
    truth.domain = {
        "parameters": [points.parameters.min(), points.parameters.max()],
        "tokens": [points.tokens.min(), points.tokens.max()],
    }
    scarce, endless = (best_allocation(truth, 1e22, unique) for unique in (1e9, 1e15))
    assert scarce.loss > endless.loss
    assert scarce.parameters * scarce.tokens * 6 == pytest.approx(1e22)
    raw = truth.law.derived(truth.values)
    alpha, beta = truth.values["alpha"], truth.values["beta"]
    scale = (alpha * raw["raw A"] / (beta * raw["raw B"])) ** (1 / (alpha + beta))
    assert endless.parameters == pytest.approx(
        scale * (1e22 / 6) ** (beta / (alpha + beta)), rel=0.02
    )
    assert "x the largest fitted N; " in best_allocation(truth, 1e25, 1e15).extrapolates
    truth.standard_errors = {"R_D": 0.1, "alpha": 9.0}
    with pytest.raises(UserError, match="nothing determines the best size: it depends on alpha"):
        best_allocation(truth, 1e22, 1e15)


def test_more_experts_lower_the_loss_and_one_is_dense():
    truth, _ = true_fit("experts")
    n, d = np.full(3, 1e9), np.full(3, 1e11)
    points = Points(n, d, np.ones(3), total_parameters=n * [1.0, 4.0, 16.0])
    losses = truth.predict(points)
    assert losses[0] > losses[1] > losses[2]
    dense = Fit(
        size_law("chinchilla", grid_of_runs()).__class__(**truth.law.settings()),
        truth.theta[:2],
        truth.beta,
        *(0, [], [], []),
    )
    assert dense.predict(points)[0] == pytest.approx(losses[0])


@pytest.mark.slow
def test_intervals_hold_the_largest_runs_of_the_public_ladder():
    inside = total = 0
    for column in ("c4_en_ce", "dolma_stack_ce"):
        points = read_points(FINAL, {"loss": column})
        large = points.parameters > 1e9
        small = points.only(np.flatnonzero(~large))
        law = size_law("chinchilla", small)
        found = fit(law, [small], Options("log", starts=3))
        bootstrap(found, [small], 12)
        low, high = point_interval(found, points.only(np.flatnonzero(large)))
        inside += int(((low <= points.loss[large]) & (points.loss[large] <= high)).sum())
        total += int(large.sum())
        assert (high / low - 1).max() < 0.2
    assert total == 10
    assert inside >= 9


@pytest.mark.slow
def test_accuracies_of_the_largest_runs_from_the_smaller():
    table = RunTable(FINAL)
    points = table.points("hellaswag_val_rc_5shot_bpb")
    scores = table.numbers("hellaswag_val_rc_5shot_acc")
    small, large = (np.flatnonzero(x) for x in (points.parameters < 1e9, points.parameters > 1e9))
    law = fit_downstream("hellaswag", points.only(small), scores[small], samples=10)
    _, predicted = law.predict(points.only(large))
    assert np.abs(predicted - scores[large]).max() < 0.03
    low, high = law.interval(points.only(large))
    assert ((low <= scores[large]) & (scores[large] <= high)).sum() >= 4
    assert (high - low).max() < 0.15


def test_a_sigmoid_is_found_again():
    truth = np.array([0.25, 0.95, 9.0, 0.9])
    points = grid_of_runs()
    points.loss = 0.3 + 0.35 * (points.loss - 1.8)
    accuracy = sigmoid(truth, points.loss)
    law = fit_downstream("task", points.only(range(0, 240, 5)), accuracy[::5], samples=2)
    assert law.values == pytest.approx(truth, rel=0.05)
    assert law.spread < 2e-3


def test_one_loss_becomes_another():
    source = np.geomspace(2.6, 4.0, 20)
    target = 0.8 + 1.1 * (source - 1.7) ** 1.05
    pairs = Pairs(source, target)
    found = fit(loss_to_loss_law(pairs), pairs, Options(priors=False))
    further = Pairs(np.array([2.2]), np.ones(1))
    assert found.predict(further)[0] == pytest.approx(0.8 + 1.1 * 0.5**1.05, rel=2e-3)
    assert found.law.derived(found.values)["E0"] == pytest.approx(1.7, rel=0.05)
    problem = Problem(found.law, [pairs], Options())
    theta = np.array([0.5, 1.2])
    _, gradient = problem(theta)
    for i in range(2):
        step = np.eye(2)[i] * 1e-6
        around = (problem(theta + step)[0] - problem(theta - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(around, rel=1e-4)


def sweeps(noise=5e-4):
    """A table of sweeps whose optima are those of the step law (arXiv 2503.04715)."""
    generator, rows = np.random.default_rng(0), []
    for n in (6e7, 2e8, 1e9):
        for d in (2e9, 1e10, 6e10):
            best = np.array([1.79 * n**-0.713 * d**0.307, 0.58 * d**0.571])
            for x in np.linspace(-2, 2, 6):
                for y in np.linspace(-2, 2, 6):
                    away = np.array([x, y]) + generator.uniform(-0.2, 0.2, 2)
                    lr, batch = best * np.exp(away)
                    loss = 2.5 + 0.02 * away[0] ** 2 + 0.008 * away[1] ** 2
                    loss += -0.006 * away.prod() + noise * generator.standard_normal()
                    rows.append((n, d, lr, batch, loss))
    return pandas.DataFrame(rows, columns=["parameters", "tokens", "lr", "batch", "loss"])


def test_the_published_step_law_is_found_again():
    table = sweeps()
    columns = (table[c].to_numpy() for c in ("parameters", "tokens", "lr", "batch", "loss"))
    optima = optima_of(*columns)
    assert all(how.startswith("parabola") for how in optima.how)
    rate, batch = fit_powers(optima)
    assert rate.coefficients[1:] == pytest.approx([-0.713, 0.307], abs=0.05)
    assert batch.coefficients[1:] == pytest.approx([0.571], abs=0.06)
    best, low, high = rate.at(7e9, 1e12)
    assert low < 1.79 * 7e9**-0.713 * 1e12**0.307 < high
    assert low < best < high


def test_an_optimum_at_the_edge_of_a_sweep_is_not_one():
    n, d, lr = np.full(6, 1e8), np.full(6, 1e9), np.geomspace(1e-4, 3e-3, 6)
    optima = optima_of(n, d, lr, np.full(6, 1e5), 3 - 0.1 * np.arange(6.0))
    assert np.isnan(optima.lr[0])
    with pytest.raises(UserError, match="enclosed by the runs of 0 pairs of N and D"):
        fit_powers(optima)


@pytest.fixture(scope="module")
def two_sizes():
    found = []
    for folder, size in (("csv_25", 25e6), ("csv_100", 100e6)):
        found.append({k: replace(c, parameters=size) for k, c in read(CURVES / folder).items()})
    return found


def test_two_sizes_share_one_law(two_sizes):
    chosen = [curves[name] for curves in two_sizes for name in FITTED]
    law = curve_law("intrinsic", chosen)
    assert [p.name for p in law.nonlinear][-3:] == ["beta", "gamma", "eta"]
    found = fit(law, chosen, Options(starts=1))
    for curves, most in zip(two_sizes, (0.13, 0.10), strict=True):
        errors = [mape(found, c) for n, c in curves.items() if n not in FITTED]
        assert len(errors) == 6
        assert np.mean(errors) <= most
    assert "prior" in found.undetermined["beta"]


@pytest.mark.slow
def test_a_third_size_lies_inside_the_interval_of_two():
    _, runs = true_fit("intrinsic")
    sized = [replace(r, parameters=n) for r, n in zip(runs, (1e8, 1e8, 4e8, 4e8), strict=True)]
    law: Any = curve_law("intrinsic", sized)
    truth = Fit(
        law,
        np.array([0.5, np.log(100.0), 0.75, 0.33, 0.1, 0.05]),
        np.array([2.0, 0.6, 0.2, 0.8]),
        *(0, [], [], []),
    )
    noise = np.random.default_rng(0).standard_normal
    noisy = [replace(r, loss=truth.predict(r) * np.exp(1e-3 * noise(len(r.loss)))) for r in sized]
    found = bootstrap(fit(law, noisy), noisy, 12)
    third = replace(runs[0], parameters=1.6e9)
    low, high = interval(found, third)
    expected = truth.predict(third)
    assert low[-1] < expected[-1] < high[-1]
    assert found.undetermined["B"] == "it follows from the prior of another one"
    refuse_undetermined(found, third, "third")  # the prior determines enough
    choice = best_size_and_schedule(found, 1e17, 1e3, 1e-3, 100)
    assert choice.parameters_interval is not None
    assert choice.parameters_interval[0] < choice.parameters < choice.parameters_interval[1]
    with pytest.raises(UserError, match=r"more than 30,000 steps of 1 tokens, 10 x the longest"):
        best_size_and_schedule(found, 1e17, 1, 1e-3, 100)
    alone = fit(curve_law("intrinsic", noisy[:2]), noisy[:2])
    with pytest.raises(UserError, match="does not include N"):
        best_size_and_schedule(alone, 1e17, 1e3, 1e-3, 100)
    assert abs(found.predict(third)[-1] / expected[-1] - 1) < 0.02


@pytest.mark.slow
def test_tables_from_the_command_line(tmp_path, capsys):
    points = grid_of_runs(0.003).only(range(0, 240, 6))
    points.loss[4] *= 1.1
    table, out = tmp_path / "runs.csv", ["--out", str(tmp_path)]
    frame = {"parameters": points.parameters, "tokens": points.tokens, "loss": points.loss}
    pandas.DataFrame(frame).to_csv(table, index=False)
    words = ["--bootstrap", "8", "--test", str(table), "--hold-out-largest", *out]
    assert main(["fit", str(table), *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert re.search(r" 1 of \d+ runs were left out as outliers", told)
    assert "runs inside their intervals" in told
    saved = json.loads((tmp_path / "fit.json").read_text())
    assert [o["name"] for o in saved["outliers"]] == ["run 5"]
    assert [t["name"] for t in saved["tests"]] == ["runs.csv", "the largest size of runs.csv"]
    fit_json = str(tmp_path / "fit.json")
    assert main(["predict", fit_json, "--parameters", "7e9", "--tokens", "1e14", *out]) == 0
    (asked,) = json.loads((tmp_path / "prediction.json").read_text())["points"]
    assert asked["low"][0] < asked["predicted"][0] < asked["high"][0]
    assert "the largest fitted D" in asked["outside"][0]
    assert main(["predict", fit_json, "--run", str(table), *out]) == 0
    assert main(["fit", str(table), "--keep-outliers", "--bootstrap", "0", *out]) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["outliers"] == []


@pytest.mark.slow
def test_other_laws_from_the_command_line(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    planned = ["--parameters", "7e9", "--tokens", "4e12"]
    words = ["--tasks", "piqa_val_rc_5shot", "--hold-out-largest", "--bootstrap", "4", *planned]
    assert main(["downstream", str(FINAL), *words, *out]) == 0
    (task,) = json.loads((tmp_path / "downstream.json").read_text())["tasks"]
    assert [r["run"] for r in task["predicted"]][-1] == "planned"
    assert 0.75 < task["predicted"][-1]["accuracy"] < 0.9
    words = ["--from", "c4_en_ce", "--to", "pile_ce", "--at", "2.6", "--bootstrap", "4", *out]
    assert main(["loss-to-loss", str(FINAL), *words]) == 0
    (asked,) = json.loads((tmp_path / "loss_to_loss.json").read_text())["translated"]
    assert asked["to"] == pytest.approx(1.93, abs=0.1)
    sweeps().to_csv(tmp_path / "sweeps.csv", index=False)
    assert main(["hyperparameters", str(tmp_path / "sweeps.csv"), *planned, *out]) == 0
    saved = json.loads((tmp_path / "hyperparameters.json").read_text())
    low, high = saved["lr"]["interval_95"]
    assert low < saved["lr"]["best"] < high
    for name in ("downstream", "loss_to_loss", "hyperparameters"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "N^-0.7" in capsys.readouterr().out


ONE_TASK = ["downstream", str(FINAL), "--tasks"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*ONE_TASK, "piqa"], "has no column|no column is known as piqa_bpb"),
        ([*ONE_TASK, "a=b"], "--tasks holds 'a=b', expected TASK or TASK=LOSS_COLUMN:ACCURACY"),
        ([*ONE_TASK, "p=pile_ce:c4_en_ce"], "the accuracy of .* is 3.7.*, expected a share"),
        ([*ONE_TASK, "piqa_val_rc_5shot", "--chance", "1"], "--chance is 1.0, expected 0 or more"),
        ([*ONE_TASK, "piqa_val_rc_5shot", "--tokens", "1e9"], "--parameters is missing"),
        (["downstream", "nowhere.csv", "--tasks", "a"], "nowhere.csv: cannot be read as csv"),
        (
            ["downstream", __file__, "--tasks", "a"],
            "expected a table, a .csv, .tsv or .parquet file",
        ),
        (["loss-to-loss", str(FINAL), "--from", "c4", "--to", "pile_ce"], "has no column 'c4'"),
        (
            ["loss-to-loss", str(FINAL), "--from", "c4_en_ce", "--to", "pile_ce", "--at", "-1"],
            "--at holds -1, expected losses above 0",
        ),
        (["hyperparameters", str(FINAL)], "no column is known as lr"),
        (["fit", str(FINAL), "--columns", "loss=nothing"], "has no column 'nothing'"),
        (["fit", str(FINAL), "--columns", "loss=pile_ce", "--law", "experts"], "total_parameters"),
        (
            ["fit", str(FINAL), "--columns", "loss=pile_ce", "--law", "data_constrained"],
            "needs every run's unique_tokens",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*words, "--out", str(tmp_path)])


def test_the_public_tables_are_those_of_their_page():
    assert len(pandas.read_csv(LADDER / "olmo_ladder_final.csv")) == 20
    assert len(pandas.read_csv(LADDER / "datablations_final.csv")) == 141
    assert pandas.read_csv(LADDER / "olmo_ladder_curves.csv").name.nunique() == 20
    assert "Apache License 2.0" in (LADDER / "README.md").read_text()
