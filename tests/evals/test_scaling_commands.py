"""``python -m evals scaling``: what a user types, sees and gets; planning and comparing."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pandas
import pytest

from benchmarks.scaling_laws import CURVES, FITTED, grid_of_runs, true_fit
from evals.scaling import Points, fit, points_of
from evals.scaling.commands import main
from evals.scaling.comparing import compare, fit_families
from evals.scaling.designing import cheapest_design
from evals.scaling.planning import best_schedules, best_size, planned_curve
from evals.scaling.tables import sentences
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig
from tests.helpers.scaling_runs import run_directory

SOURCES = [str(CURVES / f"csv_25/{name}.csv") for name in FITTED]
ONE = "kind=cosine lr=3e-4 steps=24000 warmup_steps=2160 final_ratio=0.1"


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    words = ["--warmup-steps", "2160", "--bootstrap", "8", "--out", str(folder)]
    tests = ["--test", str(CURVES / "csv_25/wsdld_20000_24000.csv")]
    assert main(["fit", *SOURCES, *words, *tests]) == 0
    return folder


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_fit_writes_what_it_found(fitted):
    saved = json.loads((fitted / "fit.json").read_text())
    assert saved["law"] == "intrinsic"
    assert 3.1 < saved["parameters"]["L0"]["value"] < 3.2
    low, high = saved["parameters"]["alpha"]["interval_95"]
    assert low < saved["parameters"]["alpha"]["value"] < high
    assert saved["test_mape"]["wsdld_20000_24000"] < 0.1
    assert len(saved["starts"]) == 2
    assert saved["seconds"] > 0
    assert is_picture(fitted / "fit.png")


def test_schedules_of_each_curve_from_a_file(tmp_path):
    file, out = tmp_path / "schedules.yaml", ["--bootstrap", "0", "--out", str(tmp_path)]
    rest = "lr=3e-4 warmup_steps=2160"
    file.write_text(
        f"cosine_24000: kind=cosine {rest} steps=24000\nconstant_24000: kind=constant {rest} "
        f"steps=24000\nwsdcon_9: kind=two_stage {rest} steps=16000 decay_fraction=0.5 "
        "final_ratio=0.3\n"
    )
    assert main(["fit", *SOURCES, "--schedule", str(file), *out]) == 0
    assert json.loads((tmp_path / "fit.json").read_text())["warnings"] == []
    file.write_text("- cosine")
    with pytest.raises(UserError, match="expected CURVE: SETTINGS"):
        main(["fit", *SOURCES, "--schedule", str(file), *out])


def test_predict_draws_runs_not_run_yet(fitted, tmp_path, capsys):
    words = ["--schedule", ONE.replace("24000", "48000"), "--run", SOURCES[0]]
    assert main(["predict", str(fitted / "fit.json"), *words, "--out", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "prediction.json").read_text())["curves"]
    assert [len(c["loss"]) for c in saved] == [400, 171]
    assert saved[0]["low"][-1] < saved[0]["loss"][-1] < saved[0]["high"][-1]
    assert saved[0]["loss"][-1] < saved[1]["loss"][-1]
    assert is_picture(tmp_path / "prediction.png")
    assert saved[0]["extrapolates"] == "2.01 x the longest fitted run"
    assert saved[1]["extrapolates"] == ""
    assert "±" in capsys.readouterr().out


def test_plan_lists_schedules_and_runs(fitted, tmp_path, capsys):
    assert (
        main(
            [
                "plan",
                str(fitted / "fit.json"),
                "--steps",
                "24000",
                "--tolerance",
                "0.01",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    saved = json.loads((tmp_path / "plan.json").read_text())
    losses = [c["loss"] for c in saved["schedules"]]
    assert losses == sorted(losses)
    assert saved["schedules"][0]["schedule"]["kind"] == "wsd"
    for choice in saved["schedules"]:
        low, high = choice["interval"]
        assert low < choice["loss"] < high
    assert saved["schedules"][-1]["schedule"]["kind"] == "constant"
    assert saved["cheapest_design"]["error"] <= 0.01
    assert is_picture(tmp_path / "plan.png")
    assert "so it prefers the highest peak" in " ".join(capsys.readouterr().out.split())


def test_laws_are_chosen_by_what_is_held_out(tmp_path, capsys):
    assert (
        main(
            [
                "fit",
                *SOURCES,
                "--law",
                "auto",
                "--bootstrap",
                "0",
                "--warmup-steps",
                "2160",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    saved = json.loads((tmp_path / "fit.json").read_text())
    assert saved["law"] == saved["choice"]["law"] == "intrinsic"
    ends = {r["law"]: r["ends"] for r in saved["choice"]["held_out"]}
    assert len(ends) == 3
    means = {law: np.mean(np.abs(list(errors.values()))) for law, errors in ends.items()}
    assert means["intrinsic"] == min(means.values())
    told = " ".join(capsys.readouterr().out.split())
    assert "error on held-out curves" in told
    assert f"with {means['intrinsic']:.3f} % mean error" in told


def test_a_law_is_chosen_by_what_smooth_curves_determine(tmp_path, capsys):
    words = ["--bootstrap", "0", "--warmup-steps", "2160", "--out", str(tmp_path)]
    assert main(["fit", *SOURCES[:2], *words]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "law: annealing: there are too few schedules to hold some out, and nothing" in told
    assert "% at the ends" in told
    assert main(["fit", SOURCES[0], SOURCES[2], *words]) == 0
    assert "the curves determine its memory" in " ".join(capsys.readouterr().out.split())


def test_nothing_is_told_that_nothing_determines(tmp_path):
    """A constant learning rate tells nothing of what a falling one gains."""
    words = ["--warmup-steps", "2160", "--bootstrap", "8", "--out", str(tmp_path)]
    assert main(["fit", SOURCES[1], *words]) == 0
    fitted = str(tmp_path / "fit.json")
    with pytest.raises(UserError, match=r"nothing determines which schedule is best: .* on C"):
        main(["plan", fitted, "--steps", "24000", "--out", str(tmp_path)])
    with pytest.raises(UserError, match=r"cosine: nothing determines its loss: it depends on C"):
        main(["predict", fitted, "--schedule", ONE, "--out", str(tmp_path)])
    constant = "kind=constant lr=3e-4 steps=24000 warmup_steps=2160"
    assert main(["predict", fitted, "--schedule", constant, "--out", str(tmp_path)]) == 0


def test_sizes_and_tokens(tmp_path):
    points = grid_of_runs(0.002)
    table = tmp_path / "runs.csv"
    pandas.DataFrame({"N": points.parameters, "D": points.tokens, "loss": points.loss}).to_csv(
        table, index=False
    )
    out = ["--out", str(tmp_path)]
    assert main(["fit", str(table), "--bootstrap", "8", *out]) == 0
    saved = json.loads((tmp_path / "fit.json").read_text())
    assert saved["law"] == "chinchilla"
    assert saved["residual"] == "log"
    assert saved["isoflop"]["exponents"]["N"] == pytest.approx(0.51, abs=0.03)
    assert is_picture(tmp_path / "fit.png")
    assert main(["plan", str(tmp_path / "fit.json"), "--flops", "1e21", *out]) == 0
    size = json.loads((tmp_path / "plan.json").read_text())["size"]
    assert size["parameters"] * size["tokens"] * 6 == pytest.approx(1e21, rel=1e-6)
    low, high = size["parameters_interval"]
    assert low <= size["parameters"] <= high
    low, high = size["loss_interval"]
    assert low < size["loss"] < high
    assert size["extrapolates"] == ""
    assert main(["plan", str(tmp_path / "fit.json"), "--flops", "1e27", *out]) == 0
    far = json.loads((tmp_path / "plan.json").read_text())["size"]
    assert "x the largest fitted N; " in far["extrapolates"]
    assert np.diff(np.log(far["loss_interval"])) > np.diff(np.log(size["loss_interval"]))
    assert size["alike"][0] < size["parameters"] < size["alike"][1]


def test_the_best_size_has_the_lowest_loss():
    points = grid_of_runs()
    from evals.scaling import Options, size_law

    found = fit(size_law("chinchilla", points), [points], Options("log"))
    choice = best_size(found, 1e20)
    sizes = choice.parameters * np.array([0.9, 1.0, 1.1])
    losses = found.predict(Points(sizes, 1e20 / (6 * sizes), np.ones(3)))
    assert losses[1] == pytest.approx(choice.loss)
    assert losses[1] < min(losses[0], losses[2])


def test_the_best_decay_beats_its_neighbours():
    found, _ = true_fit("intrinsic")
    found.domain = {"steps": [100, 3000], "peak_lr": [1e-3, 1e-3]}
    first = best_schedules(found, 3000, [1e-3], 100)[0]
    at = first.schedule.decay_fraction

    def loss(fraction):
        schedule = replace(first.schedule, decay_fraction=fraction)
        return found.predict(planned_curve(schedule, 1e-3, 3000))[-1]

    assert first.loss == pytest.approx(loss(at), abs=1e-6)
    assert loss(at) <= min(loss(at * 0.8), loss(min(at * 1.2, 0.9)))


def test_designs_that_cost_more_tell_more_and_a_drop_is_among_them():
    truth, _ = true_fit("annealing")
    target = planned_curve(ScheduleConfig("cosine", 100), 1e-3, 10_000)
    frontier, cheapest = cheapest_design(truth, target, 0.003)
    assert [d.steps for d in frontier] == sorted(d.steps for d in frontier)
    errors = [d.error for d in frontier]
    assert errors == sorted(errors, reverse=True)
    assert cheapest is not None
    assert any("two_stage" in run or "wsd" in run for run in cheapest.runs)
    assert cheapest.steps < 10_000


def family(kappa, level, seed=0, noise=0.0):
    flops = np.geomspace(1e17, 1e19, 6)
    drawn = np.exp(noise * np.random.default_rng(seed).standard_normal(6))
    side = np.sqrt(flops / 6)
    return Points(side, side, (1.7 + level * (flops / 1e18) ** -kappa) * drawn, flops=flops)


def test_where_families_cross_and_what_it_costs_to_know():
    # Equal where 1.0 c^-0.10 = 0.95 c^-0.08: c = (1 / 0.95)^(1 / 0.02).
    expected = 1e18 * (1 / 0.95) ** (1 / 0.02)
    exact = {"steep": family(0.10, 1.0), "low": family(0.08, 0.95)}
    (found,) = compare(fit_families(exact, 20), exact, 1e21)
    assert found.crossing == pytest.approx(expected, rel=0.05)
    assert found.better == "low"
    assert found.target_difference < 0, "steep is ahead beyond the crossing"
    assert found.cost == 0
    noisy = {"steep": family(0.10, 1.0, 0, 0.004), "low": family(0.08, 0.95, 1, 0.004)}
    (unsure,) = compare(fit_families(noisy, 40), noisy, 1e21)
    assert unsure.target_interval[0] < 0 < unsure.target_interval[1]
    assert unsure.cost is None or unsure.cost > 2e19
    assert unsure.refused == ""
    assert "1e+21 FLOPs, 100 x the largest run," in " ".join(sentences(unsure))
    few = {n: p.only([0, 1, 2]) for n, p in noisy.items()}
    for points, spoiled in zip(few.values(), (1.05, 0.9), strict=True):
        points.loss[1] *= spoiled
    (refused,) = compare(fit_families(few, 20), few, 1e21)
    assert len(sentences(refused)) == 1
    assert "are not compared: " in refused.refused
    far = {"a": family(0.1, 1.0, 0, 0.0005), "b": family(0.1, 1.3, 1, 0.0005)}
    (apart,) = compare(fit_families(far, 40), far, 1e20)
    assert apart.better == "a"
    assert min(apart.difference_interval) > 0
    assert apart.cost == 0


def test_compare_of_folders(tmp_path, capsys):
    for name, level in (("a", 1.0), ("b", 1.2)):
        points = family(0.1, level)
        frame = pandas.DataFrame(
            {"parameters": points.parameters, "tokens": points.tokens, "loss": points.loss}
        )
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    words = [f"{n}={tmp_path / n}.csv" for n in "ab"]
    assert main(["compare", *words, "--bootstrap", "12", "--out", str(tmp_path)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "a is ahead of b by 0.1" in told
    assert is_picture(tmp_path / "comparison.png")
    saved = json.loads((tmp_path / "comparison.json").read_text())
    assert saved["comparisons"][0]["better"] == "a"


def test_runs_of_this_project_by_size(tmp_path):
    """Final losses of run directories, as points."""
    for i in range(4):
        rows = [
            {"step": s, "tokens": s * 128, "loss": 4.0 - 0.1 * i, "lr": 1e-3}
            for s in range(20, 201, 20)
        ]
        directory = run_directory(
            tmp_path, rows, f"r{i}", schedule={"kind": "constant", "warmup_steps": 20}
        )
        model = json.loads((directory / "model.json").read_text())
        model["parameters"] *= i + 1
        (directory / "model.json").write_text(json.dumps(model))
    from evals.scaling import read_curves

    points = points_of(read_curves([tmp_path])[0])
    assert list(points.parameters) == [5000, 10000, 15000, 20000]
    with pytest.raises(UserError, match="1 different numbers of tokens do not determine both beta"):
        main(["fit", str(tmp_path), "--law", "chinchilla", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fit", *SOURCES, "--law", "intrinsik"], "did you mean 'intrinsic'"),
        (["fit", "nowhere"], "no such run directory or file"),
        (["fit", SOURCES[0], "--columns", "loss"], "--columns holds 'loss', expected WHAT=NAME"),
        (["fit", SOURCES[0], "--smooth", "1"], "--smooth is 1.0, expected 0 or more"),
        (["fit", SOURCES[0], "--law", "chinchilla"], "parameters are not known"),
        (["fit", *SOURCES, "--sized"], "number of parameters is not known; give --parameters"),
        (["fit", *SOURCES, "--sized", "--parameters", "1e6"], "1 model size does not tell"),
        (["fit", *SOURCES, "--seed", "-1"], "--seed is -1, expected 0 to"),
        (["fit", *SOURCES, "--seed", "9" * 30], "expected 0 to"),
        (["fit", *SOURCES, "--bootstrap", "-1"], "--bootstrap is -1, expected 0 to 1,000,000"),
        (["fit", *SOURCES, "--warmup-steps", "-5"], "--warmup-steps is -5, expected 0 to"),
        (["fit", *SOURCES, "--huber", "nan"], "--huber is nan, expected a number above 0"),
        (["fit", *SOURCES, "--parameters", "0"], "--parameters is 0.0, expected a number above 0"),
        (["fit", *SOURCES, "--parameters", "x=1e6"], "names 'x', which no curve is called"),
        (["fit", *SOURCES, "--parameters", "1", "a=2"], "--parameters holds '1', expected CURVE="),
        (["fit", *SOURCES, "--parameters", "many"], "--parameters is 'many', expected a number"),
        (["fit", *SOURCES, "--unit", "digits"], "--unit is 'digits', expected nats or bits"),
        (["fit", *SOURCES, "--columns", "los=a"], "--columns names 'los', expected one of step"),
        (["fit", *SOURCES, "--branch-of", "x"], "--branch-of is 'x', expected CURVE=TRUNK"),
        (["fit", *SOURCES, "--branch-of", "wsdcon_9=x"], "branches off 'x', which no curve"),
        (["fit", *SOURCES, "--points", "-1"], "--points is -1, expected 0 to"),
        (["plan", "none.json", "--steps", "0"], "--steps is 0, expected 1 to"),
        (["plan", "none.json", "--flops", "inf"], "--flops is inf, expected a number above 0"),
        (["predict", "none.json", "--schedule", ONE], "none.json: not a fit"),
        (["compare", "a"], "found 'a', expected NAME=SOURCE"),
        (["compare", f"a={SOURCES[0]}"], "parameters are not known"),
        (
            ["compare", SOURCES[0], "--by", "model.pattern"],
            "--by is 'model.pattern', a setting that",
        ),
    ],
)
def test_bad_input_is_one_sentence(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        main([*words, "--out", str(tmp_path)])


@pytest.mark.parametrize("command", ["fit", "predict", "plan", "compare"])
def test_a_file_in_place_of_the_output_folder_is_refused_before_the_work(command):
    with pytest.raises(UserError, match=r"--out is .*\.py, a file; expected a folder"):
        main([command, "nowhere", "--out", __file__])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "plan needs --steps, or --flops"),
        (["plan", "--steps", "5"], "--steps is 5, expected at least 12"),
        (["plan", "--flops", "1e18"], "needs --tokens-per-step"),
        (
            ["plan", "--flops", "1e18", "--tokens-per-step", "1e5"],
            "the fitted law does not include N",
        ),
        (["predict"], "predict needs --schedule"),
    ],
)
def test_bad_input_to_what_is_fitted(words, message, fitted, tmp_path):
    command, *rest = words
    with pytest.raises(UserError, match=message):
        main([command, str(fitted / "fit.json"), *rest, "--out", str(tmp_path)])
