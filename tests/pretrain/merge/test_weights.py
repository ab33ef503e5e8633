"""The weights of merges, against decays of the same updates in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.errors import UserError
from pretrain.config import DECAYS, ScheduleConfig, learning_rate
from pretrain.merge.weights import RULES, check_constant, weights_of

SHAPES = [
    (decay, ratio)
    for decay in DECAYS
    for ratio in (0.0, 0.1)
    if (decay, ratio) != ("exponential", 0.0)
]


def path_of(start, updates, rates):
    """The weights after every step of SGD with these updates: [steps + 1, size]."""
    moved = -np.asarray(rates)[:, None] * updates
    return start + np.concatenate([np.zeros((1, len(start))), np.cumsum(moved, axis=0)])


@pytest.mark.parametrize(("decay", "ratio"), SHAPES)
def test_all_steps_saved_is_the_decay_of_the_same_updates(decay, ratio):
    """With a run's own schedule: a constant trunk against wsd, which decays in its last half."""
    generator, length, peak = np.random.default_rng(0), 24, 3e-2
    start, updates = generator.normal(size=5), generator.normal(size=(length, 5))
    trunk = path_of(start, updates, np.full(length, peak))
    wsd = ScheduleConfig("wsd", 0, decay, 0.5, ratio)
    rates = [learning_rate(wsd, peak, step, length) for step in range(length)]
    wanted = path_of(start, updates, rates)[-1]
    steps = range(length // 2, length + 1)
    merged = weights_of("inverse-decay", steps, decay, ratio) @ trunk[list(steps)]
    assert np.abs(merged - wanted).max() < 1e-15


@pytest.mark.parametrize(("decay", "ratio"), SHAPES)
def test_some_steps_saved_is_a_decay_in_stairs(decay, ratio):
    """Unequal distances: exactly that, and the decay itself where updates are alike."""
    generator, steps = np.random.default_rng(1), [3, 5, 11, 12, 20]
    start, updates = generator.normal(size=5), generator.normal(size=(20, 5))
    wsd = ScheduleConfig("wsd", 0, decay, 17 / 20, ratio)
    rates = np.array([learning_rate(wsd, 1.0, step, 20) for step in range(20)])
    stairs, alike = rates.copy(), updates.copy()
    for a, b in itertools.pairwise(steps):
        stairs[a:b] = rates[a:b].mean()
        alike[a:b] = updates[a]
    weights = weights_of("inverse-decay", steps, decay, ratio)
    for given_updates, wanted in ((updates, stairs), (alike, rates)):
        trunk = path_of(start, given_updates, np.ones(20))
        difference = weights @ trunk[steps] - path_of(start, given_updates, wanted)[-1]
        assert np.abs(difference).max() < 1e-14
    assert not np.allclose(weights, 1 / 5)


@given(
    steps=st.lists(st.integers(0, 300), min_size=2, max_size=9, unique=True).map(sorted),
    shape=st.sampled_from(SHAPES),
)
def test_weights_are_an_average(steps, shape):
    for rule in RULES:
        weights = weights_of(rule, steps, *shape)
        assert weights.sum() == pytest.approx(1, abs=1e-14)
        assert weights.min() >= -1e-15
    rising = weights_of("linear", steps)
    assert rising == pytest.approx(rising[0] * np.arange(1, len(steps) + 1))


def test_equal_weights_are_a_linear_decay_to_nothing():
    weights = weights_of("inverse-decay", range(10, 21), "linear", 0.0)
    assert weights == pytest.approx([0.0, *[0.1] * 10], abs=1e-15)


def test_only_a_constant_rate_has_a_decay():
    rates = [1e-3] * 5 + [5e-4] * 5
    check_constant(rates, 0, 5)
    check_constant(rates, 5, 10)
    message = "goes from 0.001 to 0.0005 between steps 3 and 8, expected a constant one"
    with pytest.raises(UserError, match=message):
        check_constant(rates, 3, 8)
