"""Laws and their fits: derivatives, exact recovery, held-out curves, intervals, what is told."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.scaling_coverage import held_out_ends, lead
from benchmarks.scaling_laws import CURVES, FITTED, TRUTH, grid_of_runs, read, true_fit
from evals.scaling import (
    CURVE_LAWS,
    LAWS,
    SIZE_LAWS,
    AnnealingLaw,
    IntrinsicTimeLaw,
    MultiPowerLaw,
    Options,
    Points,
    bootstrap,
    curve_law,
    fit,
    interval,
    load_fit,
    size_law,
)
from evals.scaling.choosing import HeldOut, _surely_better, choose_law, hold_out_schedules
from evals.scaling.fitting import Problem, _least_squares
from evals.scaling.intervals import mape
from evals.scaling.planning import best_size, planned_curve
from evals.scaling.point_intervals import refuse_unlike
from evals.scaling.size_laws import frontier_exponents, isoflop_profiles
from pretrain.common.errors import UserError
from pretrain.config import ScheduleConfig


@pytest.fixture(scope="module")
def curves():
    return read(CURVES / "csv_25")


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("residual", ["relative", "log"])
def test_gradients_are_those_of_differences(name, residual):
    truth, runs = true_fit(name)
    noise = np.random.default_rng(0).standard_normal
    noisy = [replace(r, loss=truth.predict(r) * np.exp(0.003 * noise(len(r.loss)))) for r in runs]
    problem = Problem(truth.law, [truth.law.prepared(r) for r in noisy], Options(residual))
    theta = truth.theta * 1.05 + 0.01
    _, gradient = problem(theta)
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-6
        around = (problem(theta + step)[0] - problem(theta - step)[0]) / 2e-6
        assert gradient[i] == pytest.approx(around, rel=1e-4, abs=1e-4)


def test_sized_laws_have_right_derivatives():
    _, runs = true_fit("intrinsic")
    sized = [replace(r, parameters=n) for r, n in zip(runs, (1e6, 2e6, 4e6, 8e6), strict=True)]
    law = curve_law("intrinsic", sized, True, True, True)
    assert [p.name for p in law.nonlinear][-3:] == ["beta", "gamma", "eta"]
    theta = np.array([0.5, 4.0, 0.7, 0.3, 0.2, -0.1])
    for run in sized:
        prepared = law.prepared(run)
        columns, derivatives = law.design(theta, prepared)
        assert columns.shape == (len(run.loss), 4)
        for i in range(len(theta)):
            step = np.zeros(len(theta))
            step[i] = 1e-6
            up, down = (law.design(theta + s, prepared)[0] for s in (step, -step))
            assert np.allclose(derivatives[i], (up - down) / 2e-6, rtol=1e-5, atol=1e-8)


def test_decayed_sums_are_the_sums_of_the_definition(curves):
    """S2 of the annealing law by its recursion, step for step."""
    curve, law = curves["cosine_24000"], AnnealingLaw()
    memory, momentum, s2 = 300.0, 0.0, 0.0
    decay, seen = np.exp(-1 / memory), {}
    for i in range(curve.warmup + 1, curve.step[-1] + 1):
        momentum = decay * momentum + curve.lr[i - 1] - curve.lr[min(i, len(curve.lr) - 1)]
        s2 += momentum
        seen[i] = s2
    columns, _ = law.design(np.array([0.5, np.log(memory)]), law.prepared(curve))
    expected = np.array([seen.get(int(s), 0.0) for s in curve.step])
    assert np.allclose(-columns[:, 2], expected, rtol=1e-9, atol=1e-12)
    s1 = np.array([curve.lr[:s].sum() for s in curve.step])
    assert np.allclose(columns[:, 1], s1**-0.5)


def test_multi_power_blocks_change_nothing_that_matters(curves):
    curve, law = curves["cosine_24000"], MultiPowerLaw(3e-4)
    theta = np.array([0.5, np.log(10.0), np.log(0.6), 0.4])
    blocks = law.design(theta, law.prepared(curve))[0]
    law.block = 1
    assert np.allclose(blocks, law.design(theta, law.prepared(curve))[0], atol=1e-4)


@pytest.mark.parametrize("name", LAWS)
def test_what_a_law_made_is_found_again(name):
    truth, runs = true_fit(name)
    exact = [replace(run, loss=truth.predict(run)) for run in runs]
    found = fit(truth.law, exact, Options(truth.options.residual, priors=False))
    for parameter, value in truth.values.items():
        assert found.values[parameter] == pytest.approx(value, rel=1e-3), parameter


def test_chinchilla_to_four_digits():
    points = grid_of_runs()
    found = fit(size_law("chinchilla", points), [points], Options("log"))
    raw = found.law.derived(found.values)
    values = {**found.values, "A": raw["raw A"], "B": raw["raw B"]}
    for name, value in TRUTH.items():
        assert values[name] == pytest.approx(value, rel=5e-5)


@pytest.mark.parametrize(("folder", "most"), [("csv_25", 0.105), ("csv_100", 0.135)])
def test_held_out_curves_are_predicted(folder, most):
    found = read(CURVES / folder)
    chosen = [found[name] for name in FITTED]
    fitted = fit(curve_law("intrinsic", chosen), chosen)
    errors = {n: mape(fitted, c) for n, c in found.items() if n not in FITTED}
    assert len(errors) == 6
    assert np.mean(list(errors.values())) <= most
    assert len(fitted.law.parameters) == 6


@pytest.mark.parametrize("folder", ["csv_25", "csv_100"])
def test_the_lead_of_wsd_over_cosine(folder):
    found = read(CURVES / folder)
    for stage in ("wsdcon_3", "wsdcon_9", "wsdcon_18"):
        for decay in ("wsd_20000_24000", "wsdld_20000_24000"):
            fitted = ("constant_24000", "cosine_24000", stage)
            assert 1 / 1.3 < lead(found, fitted, "intrinsic", decay) < 1.3


@pytest.mark.slow
def test_the_law_that_is_chosen_has_that_lead():
    found = read(CURVES / "csv_100")
    chosen = choose_law([found[n] for n in ("constant_24000", "cosine_24000", "wsdcon_18")])
    assert chosen.law == "intrinsic"
    assert "no other law is surely better" in chosen.why
    ends = {r.law: r.end for r in chosen.held_out}
    assert ends["annealing"] < ends["intrinsic"]  # by chance


@pytest.mark.slow
def test_intervals_hold_the_ends_of_curves_that_were_not_fitted():
    inside = []
    for folder in ("csv_25", "csv_100"):
        found = read(CURVES / folder)
        for fitted in list(itertools.combinations(found, 3))[5::12]:
            rows = held_out_ends(found, fitted, "intrinsic", 16)
            inside += [abs(error) <= half for _, error, half in rows]
    assert len(inside) == 84
    assert 0.85 <= np.mean(inside) <= 0.99


def test_one_cosine_does_not_determine_the_memory(curves):
    for name in ("cosine_24000", "cosine_72000"):
        assert "memory" in fit(AnnealingLaw(), [curves[name]]).undetermined
    constant = fit(AnnealingLaw(), [curves["constant_24000"]])
    assert {"memory", "C"} <= constant.undetermined.keys()
    assert not fit(AnnealingLaw(), [curves[name] for name in FITTED]).undetermined


def test_intervals_do_not_depend_on_the_processes_and_tell_how_wrong_the_law_is():
    truth, runs = true_fit("annealing")
    noise = np.random.default_rng(0).standard_normal
    widths = []
    for wrong in (0.0, 1e-2):
        noisy = [
            replace(
                r,
                loss=truth.predict(r)
                * np.exp(5e-4 * noise(len(r.loss)) + wrong * np.sin(i + 2 * np.log(r.step))),
            )
            for i, r in enumerate(runs)
        ]
        one = bootstrap(fit(truth.law, noisy), noisy, 12, processes=1)
        two = bootstrap(fit(truth.law, noisy), noisy, 12, processes=2)
        assert one.samples is not None
        assert two.samples is not None
        assert np.array_equal(one.samples, two.samples)
        low, high = one.intervals["alpha"]
        widths.append(high - low)
        curve_low, curve_high = interval(one, noisy[0])
        run_low, run_high = interval(one, noisy[0], new_run=True)
        assert (curve_low < curve_high).all()
        assert np.mean(run_high - run_low) > np.mean(curve_high - curve_low)
    assert widths[1] > 3 * widths[0]


def test_a_parameter_of_which_only_its_prior_tells_has_the_priors_interval(curves):
    chosen = [curves["constant_24000"]]
    found = bootstrap(fit(IntrinsicTimeLaw(3e-4), chosen), chosen, 60)
    low, high = found.intervals["q"]
    assert low < 0.54
    assert high > 0.66
    assert "q" in found.undetermined


def test_spikes_move_a_fit_little():
    truth, runs = true_fit("intrinsic")
    exact = [replace(run, loss=truth.predict(run)) for run in runs]
    spoiled = [replace(run, loss=run.loss.copy()) for run in exact]
    for run in spoiled:
        run.loss[[20, 21, 70]] += 1.5
    found = fit(truth.law, spoiled, Options(priors=False))
    assert found.values["L0"] == pytest.approx(truth.values["L0"], rel=5e-3)
    assert mape(found, exact[0]) < 0.1


def test_schedules_held_out(curves):
    chosen = [curves[n] for n in (*FITTED, "wsdcon_3")]
    result = hold_out_schedules(lambda rest: curve_law("annealing", rest), chosen)
    assert result.errors.keys() == {c.name for c in chosen}
    assert 0.03 < result.mean < 1
    with pytest.raises(UserError, match="2 different schedules: expected at least 3"):
        hold_out_schedules(lambda rest: curve_law("annealing", rest), chosen[:2])


def test_few_held_out_schedules_are_sure_of_little():
    """Three schedules at 100M favored a law that is worse on the six others."""

    def held(law, ends, folds):
        named = {str(i): end for i, end in enumerate(ends)}
        return HeldOut(law, {}, named, folds)

    folds = [["0"], ["1"], ["2"]]
    first = held("intrinsic", (0.001, 0.417, -0.198), folds)
    assert not _surely_better(held("annealing", (-0.015, 0.138, 0.081), folds), first)
    assert _surely_better(
        held("annealing", (0.0, 0.2, 0.0), folds), held("a", [0.2, 0.4, -0.3], folds)
    )
    # What is held out together errs together, so it counts once.
    ends = (0.30, 0.31, 0.29, 0.10), (0.20, 0.21, 0.19, 0.11)
    alike, apart = [["0", "1", "2"], ["3"]], [["0"], ["1"], ["2"], ["3"]]
    assert not _surely_better(held("b", ends[1], alike), held("a", ends[0], alike))
    assert _surely_better(held("b", ends[1], apart), held("a", ends[0], apart))


def test_collinear_terms_are_named_and_solved_alike():
    generator = np.random.default_rng(0)
    x = generator.uniform(1, 2, 200)
    for noise in (0.0, 1e-15, 1e-13):
        twice = x * (1 + noise * generator.standard_normal(200))
        columns = np.stack([np.ones(200), x, twice], axis=1)
        assert _least_squares(columns, 1 + 2 * x, np.ones(200)) == pytest.approx(1, abs=1e-6)
    n = np.geomspace(1e7, 1e10, 12)
    loss = 1.8 + (482 + 2085 * 20**-0.35) * n**-0.35
    points = Points(n, 20 * n, loss)
    found = fit(size_law("chinchilla", points), [points], Options("log"))
    assert found.undetermined["A"] == "the data cannot tell its term from B's"
    assert {"alpha", "beta", "B"} <= found.undetermined.keys()
    with pytest.raises(UserError, match="nothing determines the best size: it depends on"):
        best_size(found, 1e20)
    refuse_unlike(found, Points(np.array([1e9]), np.array([2e10]), np.ones(1)))
    with pytest.raises(UserError, match=r"run 1: nothing determines its loss: .* .10 x"):
        refuse_unlike(found, Points(np.array([1e8]), np.array([2e10]), np.ones(1)))


@pytest.mark.parametrize("name", ["intrinsic", "chinchilla"])
def test_a_saved_fit_predicts_the_same(name, tmp_path):
    truth, runs = true_fit(name)
    exact = [replace(run, loss=truth.predict(run)) for run in runs]
    found = bootstrap(fit(truth.law, exact, truth.options), exact, 4)
    found.save(tmp_path / "fit.json")
    again = load_fit(tmp_path / "fit.json")
    assert np.allclose(again.predict(runs[0]), found.predict(runs[0]), rtol=1e-12)
    assert np.allclose(again.predict_samples(runs[0]), found.predict_samples(runs[0]), rtol=1e-12)
    assert again.values == pytest.approx(found.values)
    (tmp_path / "fit.json").write_text("{}")
    with pytest.raises(UserError, match=r"fit.json: not a fit that this command wrote"):
        load_fit(tmp_path / "fit.json")


def test_isoflop_profiles_find_the_frontier():
    budgets, runs = np.geomspace(1e18, 1e21, 5), []
    law: Any = size_law("chinchilla", grid_of_runs())
    values = {"alpha": 0.3478, "beta": 0.3658, "E": 1.8172}
    raw = {"A": 482.01, "B": 2085.43}
    values["A"] = raw["A"] / law.size_reference ** values["alpha"]
    values["B"] = raw["B"] / law.token_reference ** values["beta"]
    best, _ = law.optimum(values, budgets)
    for budget, n in zip(budgets, best, strict=True):
        for size in n * np.geomspace(0.4, 2.5, 7):
            runs.append((size, budget / (6 * size)))
    n, d = np.array(runs).T
    loss = 1.8172 + raw["A"] * n**-0.3478 + raw["B"] * d**-0.3658
    profiles = isoflop_profiles(Points(n, d, loss))
    assert len(profiles) == 5
    assert all(p["inside"] for p in profiles)
    assert np.allclose([p["parameters"] for p in profiles], best, rtol=0.03)
    exponents = frontier_exponents(profiles)
    assert exponents["N"] == pytest.approx(0.3658 / (0.3478 + 0.3658), abs=0.01)
    assert exponents["N"] + exponents["D"] == pytest.approx(1, abs=0.01)


def test_repeated_data_is_worth_less():
    law = SIZE_LAWS["data_constrained"](1e8, 1e9)
    n, d = np.full(3, 1e8), np.array([1e9, 4e9, 4e9])
    points = Points(n, d, np.ones(3), unique_tokens=np.array([1e9, 4e9, 1e9]))
    theta = np.array([0.35, 0.37, np.log(15.0), np.log(5.0), 0.43])
    beta = np.array([1.8, 0.7])
    once, fresh, repeated = law.loss(theta, beta, law.prepared(points))
    assert fresh < repeated < once


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((1e6,) * 4, "1 model size does not tell what size is worth"),
        ((None,) * 4, "number of parameters"),
    ],
)
def test_sizes_that_do_not_determine_the_exponent(sizes, message):
    _, runs = true_fit("intrinsic")
    with pytest.raises(UserError, match=message):
        curve_law(
            "intrinsic",
            [replace(r, parameters=n) for r, n in zip(runs, sizes, strict=True)],
            sized=True,
        )


def test_too_few_points_are_refused():
    curve = planned_curve(ScheduleConfig("cosine", 10), 1e-3, 100, points=1)
    with pytest.raises(UserError, match="6 parameters, but there are 1 losses to fit"):
        fit(IntrinsicTimeLaw(1e-3), [curve])
    points = Points(np.array([1e6, 2e6, 3e6]), np.full(3, 1e9), np.array([3.0, 2.9, 2.8]))
    with pytest.raises(UserError, match="1 different numbers of tokens do not determine both beta"):
        size_law("chinchilla", points)


def test_every_law_says_what_its_parameters_are():
    for name, law in LAWS.items():
        made = law()
        assert made.name == name
        assert made.source
        assert made.__doc__
        for parameter in made.parameters:
            assert parameter.meaning
            assert parameter.low < parameter.high
            assert parameter.starts or parameter in made.linear
    assert next(iter(CURVE_LAWS)) == "intrinsic"
