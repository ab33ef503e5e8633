"""Decisions between arms: the posterior's symmetries, the rule, and replays of public ladders."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from benchmarks.decide_suites import suites
from evals.scaling.decide import (
    LOSS,
    TASK,
    Campaign,
    Rule,
    Run,
    Target,
    infer,
    observe,
    play,
)
from evals.scaling.decide.accidents import spread_grows
from evals.scaling.decide.replay import branched
from evals.scaling.decide.simulate import SIZES, TARGET, Kind, ladders

ARMS = ("a", "b", "c")
SMALL = (20e6, 60e6, 150e6, 300e6)


def _made_up(seed: int = 0, arms: tuple[str, ...] = ARMS) -> list[Run]:
    return ladders("laws", LOSS, np.random.default_rng(seed), arms, sizes=SMALL, seeds=2)[0]


def _chance(runs: list[Run], a: str = "a", b: str = "b") -> float:
    targets = dict.fromkeys(sorted({run.arm for run in runs}), TARGET)
    return infer(observe(runs, targets), LOSS).better(a, b)


def test_the_posterior_depends_on_no_unit_order_or_name() -> None:
    runs = _made_up()
    chance = _chance(runs)
    assert 1e-6 < chance < 1 - 1e-6
    bits = [replace(run, value=run.value / math.log(2)) for run in runs]
    assert abs(_chance(bits) - chance) < 1e-9
    assert abs(_chance(runs[::-1]) - chance) < 1e-9
    swapped = [replace(run, arm={"a": "b", "b": "a"}.get(run.arm, run.arm)) for run in runs]
    assert abs(_chance(swapped) - (1 - chance)) < 1e-9


def test_the_marginal_likelihood_and_the_mean_are_those_of_the_full_gaussian() -> None:
    """One matrix over all runs, seeds apart, has the same posterior as the blocks."""
    from evals.scaling.decide.inference import covariance_of, noise_of

    runs = _made_up(3)
    seen = observe(runs, dict.fromkeys(ARMS, TARGET))
    posterior = infer(seen, LOSS)
    draw = 5
    rows = sorted(runs, key=lambda r: (r.arm, r.cell, r.seed))
    arm = np.array([seen.arms.index(r.arm) for r in rows])
    cell = np.array([seen.cells.index(r.cell) for r in rows])
    by_arm = {
        c: [[r.value for r in runs if (r.arm, r.cell) == (a, c)] for a in ARMS] for c in seen.cells
    }
    middle = {c: np.mean([np.mean(values) for values in by_arm[c]]) for c in seen.cells}
    u = np.array([-(r.value - middle[r.cell]) / seen.slope(r.cell) for r in rows])
    places = seen.positions()
    full = covariance_of(posterior.draws, slice(None), places, places)[draw]
    same = arm[:, None] == arm[None]
    matrix = np.where(same, full[arm[:, None], cell[:, None], cell[None]], 0.0)
    matrix += 1.5**2 * (cell[:, None] == cell[None])
    matrix += np.diag(noise_of(posterior.draws)[draw][arm])
    level = posterior.draws.sizes[draw, 0] ** 2
    cross = level * (arm[None] == np.arange(3)[:, None])
    mean = cross @ np.linalg.solve(matrix, u)
    covariance = level * np.eye(3) - cross @ np.linalg.solve(matrix, cross.T)
    np.testing.assert_allclose(posterior.mean[draw], mean, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(posterior.covariance[draw], covariance, rtol=1e-6, atol=1e-9)


def test_what_a_run_would_resolve_is_what_it_resolves() -> None:
    """The gain's rank-one update and the refit with one run more agree on the variance."""
    from evals.scaling.decide.acquisition import resolved
    from evals.scaling.decide.inference import variance_after

    runs = [run for run in _made_up(1) if run.seed == 0 and run.parameters < 300e6]
    posterior = infer(observe(runs, dict.fromkeys(ARMS, TARGET)), LOSS)
    arms = posterior.observations.arms
    for cell in (runs[0].cell, (300e6, 30e9)):
        fall = resolved(posterior, [0, 2], cell)
        more = [Run(arms[i], *cell, seed=1) for i in (0, 2)]
        expected = posterior.covariance - variance_after(posterior, more)
        np.testing.assert_allclose(fall, expected, rtol=1e-5, atol=1e-9)


def test_a_decision_never_spends_more_than_its_budget_and_says_why_it_ends() -> None:
    runs = _made_up(2, ("a", "b"))
    for budget in (0.05, 0.3):
        campaign = Campaign(dict.fromkeys("ab", TARGET), LOSS, Rule(budget=budget))
        step = play(campaign, runs).step
        assert step.spent <= budget * 2 * TARGET.cost * (1 + 1e-9)
        assert step.reason in ("verdict", "budget", "futile", "all made")
    campaign = Campaign(dict.fromkeys("ab", TARGET), LOSS, Rule(budget=1e-4))
    step = play(campaign, runs).step
    assert (step.reason, step.spent) == ("budget", 0)


def test_no_verdict_without_reach_and_span() -> None:
    """However clear the runs are, sizes far below the target do not decide."""
    sizes = (20e6, 60e6, 150e6)
    runs = [
        Run(arm, size, 100 * size, 0, 2.0 + 10 * size**-0.2 + (0.3 if arm == "b" else 0.0))
        for arm in "ab"
        for size in sizes
    ]
    campaign = Campaign(dict.fromkeys("ab", TARGET), LOSS)
    assert play(campaign, runs).step.verdicts == []
    runs += [Run(arm, 300e6, 30e9, 0, 2.2 + (0.3 if arm == "b" else 0.0)) for arm in "ab"]
    (verdict,) = play(Campaign(dict.fromkeys("ab", TARGET), LOSS), runs).step.verdicts
    assert (verdict.kind, verdict.pair) == ("better", ("a", "b"))
    assert verdict.low < verdict.middle < verdict.high


def test_a_second_diverged_run_ends_as_unstable_and_one_does_not() -> None:
    runs = [
        replace(run, value=math.nan) if run.arm == "b" and run.parameters == 60e6 else run
        for run in _made_up(4, ("a", "b"))
    ]
    step = play(Campaign(dict.fromkeys("ab", TARGET), LOSS), runs).step
    assert step.reason != "unstable" and step.spent > 0
    runs = [replace(run, value=math.nan) if run.arm == "b" else run for run in runs]
    step = play(Campaign(dict.fromkeys("ab", TARGET), LOSS), runs).step
    assert (step.reason, step.unstable) == ("unstable", ["b"])


def test_few_tokens_per_parameter_are_left_out_but_not_lengths_of_one_size() -> None:
    target = Target(1e9, 100e9)
    lengths = [Run(arm, 300e6, tokens, 0, 3.0) for arm in "ab" for tokens in (10e9, 30e9)]
    sizes = [Run(arm, 100e6, 2e9, 0, 3.0) for arm in "ab"]
    campaign = Campaign(dict.fromkeys("ab", target), LOSS)
    assert len(campaign._usable(lengths, lengths)) == 4
    assert {r.tokens for r in campaign._usable(lengths + sizes, lengths + sizes)} == {30e9}


def test_seeds_that_spread_with_size_are_found() -> None:
    random = np.random.default_rng(0)
    wide = [
        Run(arm, size, size * 20, seed, float((size / 1e7 if arm == "b" else 1) * value))
        for arm in "ab"
        for size in (1e7, 1e8)
        for seed, value in enumerate(random.standard_normal(6))
    ]
    assert spread_grows(wide) == ["b"]


def test_lengths_of_one_trunk_cost_what_is_new() -> None:
    price = branched(0.1)
    first, second = Run("a", 1.0, 10.0), Run("a", 1.0, 20.0)
    assert price(first, []) == 60
    assert price(second, [first]) == pytest.approx(6 * (2 + 9))
    assert price(second, [replace(first, arm="b")]) == 120


def test_of_three_arms_the_hopeless_one_is_left_out() -> None:
    worse = {"a": 0.0, "b": 0.002, "c": 0.5}
    runs = [
        Run(arm, size, 100 * size, seed, 2 + 10 * size**-0.2 + extra + 0.001 * seed)
        for arm, extra in worse.items()
        for size in SMALL
        for seed in range(2)
    ]
    step = play(Campaign(dict.fromkeys(worse, TARGET), LOSS), runs).step
    assert step.posterior is not None
    assert step.posterior.best()["c"] < 0.02
    assert sorted(step.left) == ["a", "b"]


def test_shapes_and_corpora_have_no_clearly_wrong_verdict() -> None:
    """Lengths of one size; two arms with lengths of several sizes."""
    chosen = [s for s in suites() if s.name.startswith("corpora, 0.41B")]
    for suite in chosen:
        campaign = Campaign(suite.targets, suite.prior, suite.rule, nats=True)
        (verdict,) = play(campaign, suite.runs, suite.price).step.verdicts
        assert suite.truth[verdict.pair[0]] < suite.truth[verdict.pair[1]]


@pytest.mark.slow
def test_public_ladders_are_decided_as_often_and_as_rightly_as_promised() -> None:
    """All arms in one decision, at .95: DataDecide's stable arms, shapes and optimizers."""
    said = right = 0
    names = ("datadecide, stable", "optimizers, 0.54B", "corpora")
    for suite in (s for s in suites() if s.name.startswith(names)):
        campaign = Campaign(
            suite.targets, suite.prior, suite.rule, goal="pairs", pairs=suite.pairs, nats=suite.nats
        )
        step = play(campaign, suite.runs, suite.price).step
        assert step.spent <= campaign.budget * (1 + 1e-9)
        gaps = [suite.truth[b] - suite.truth[a] for a, b in (v.pair for v in step.verdicts)]
        said += len(gaps)
        right += sum(gap > 0 for gap in gaps)
        if suite.name.startswith("datadecide"):
            assert len(gaps) >= 19
            assert step.spent <= 0.3 * 11 * TARGET.cost
        else:
            assert all(gap > -0.004 for gap in gaps)
    assert right >= 0.9 * said
    assert said >= 19 + 18


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most_wrong"), [("equal", 1), ("laws", 1), ("model", 1)])
def test_made_up_pairs_are_decided_rightly(kind: Kind, most_wrong: int) -> None:
    """Equal arms have no winner, so that any verdict about one is wrong."""
    wrong = 0
    for index in range(12):
        runs, truth = ladders(kind, LOSS, np.random.default_rng([index, 7]), sizes=SIZES)
        for verdict in play(Campaign(dict.fromkeys("ab", TARGET), LOSS), runs).step.verdicts:
            first, second = verdict.pair
            wrong += verdict.kind == "better" and not truth[first] < truth[second]
    assert wrong <= most_wrong


def test_pairs_of_a_suite_have_one_target() -> None:
    (shapes,) = (suite for suite in suites() if suite.name.startswith("shapes"))
    assert 10 < len(shapes.pairs) < len(list(combinations(shapes.targets, 2)))
    assert TASK.for_data().breaking == 0.12
    assert TASK.breaking == 0.04
