from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.common.config_loader import ConfigError
from pretrain.config import (
    DECAYS,
    SCHEDULES,
    DataConfig,
    ModelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
    check_run_config,
)
from pretrain.config.schedule import fraction_of_steps, learning_rate


def curve(num_steps=100, **settings):
    config = ScheduleConfig(**{"warmup_steps": 10, **settings})
    return [learning_rate(config, 2.0, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_is_linear_and_reaches_the_peak(kind):
    values = curve(kind=kind)
    assert values[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert max(values) == values[9] == 2.0
    assert values[9:] == sorted(values[9:], reverse=True)


def test_cosine_and_linear_meet_in_the_middle():
    cosine, linear = curve(kind="cosine", final_ratio=0.2), curve(kind="linear", final_ratio=0.2)
    assert cosine[55] == pytest.approx(linear[55]) == pytest.approx(1.2)
    assert cosine[20] > linear[20]
    assert cosine[99] == pytest.approx(2 * (0.2 + 0.4 * (1 + math.cos(math.pi * 89 / 90))))


@pytest.mark.parametrize("decay", DECAYS)
def test_wsd_is_flat_then_decays(decay):
    values = curve(kind="wsd", decay=decay, decay_fraction=0.2, final_ratio=0.01)
    assert values[10:81] == [2.0] * 71
    assert values[81] < 2.0
    shape = {"linear": 1 - 0.99 * 0.5, "sqrt": 1 - 0.99 * 0.5**0.5, "exponential": 0.1}[decay]
    assert values[90] == pytest.approx(2 * shape)


def test_two_stage_drops_at_once():
    values = curve(kind="two_stage", decay_fraction=0.25, final_ratio=0.3)
    assert values[10:75] == [2.0] * 65
    assert values[75:] == [0.6] * 25


@given(st.integers(1, 4), st.integers(1, 20_000), st.data())
def test_a_share_of_the_steps_is_that_of_the_decimal_fraction(digits, num_steps, data):
    """Whatever the binary product is: 0.57 x 100 is 56.99999999999999."""
    parts = data.draw(st.integers(1, 10**digits))
    fraction = Fraction(parts, 10**digits)
    found = fraction_of_steps(parts / 10**digits, num_steps)
    exact = fraction * num_steps
    assert found == pytest.approx(float(exact), rel=1e-15)
    assert (Fraction(found) == exact) or exact.denominator > 1
    assert math.ceil(num_steps - found) == math.ceil(num_steps - exact)
    assert int(num_steps - found) == int(num_steps - exact)


def test_fractions_without_end_are_meant_as_what_they_come_near():
    for num_steps in (3, 3_000, 3_000_000):
        for fraction in (1 / 3, 0.333333333333):
            assert fraction_of_steps(fraction, num_steps) == num_steps // 3
    assert fraction_of_steps(0.25, 10) == 2.5
    assert 0 < fraction_of_steps(1e-9, 10) < 1, "never nothing"


@pytest.mark.parametrize("num_steps", [10, 50, 99, 100, 200])
def test_every_percentage_begins_to_decay_where_it_says(num_steps):
    for percent in range(1, 101):
        flat = num_steps - Fraction(percent, 100) * num_steps
        settings = {"decay_fraction": percent / 100, "warmup_steps": 0, "final_ratio": 0.5}
        drop = curve(num_steps, kind="two_stage", **settings)
        assert drop == [2.0 if step < flat else 1.0 for step in range(num_steps)], percent
        for decay in DECAYS:
            values = curve(num_steps, kind="wsd", decay=decay, **settings)
            assert [v < 2.0 for v in values] == [step > flat for step in range(num_steps)]


@pytest.mark.parametrize("kind", ["wsd", "two_stage"])
def test_a_warm_up_may_end_where_the_decay_begins(kind):
    """Of every percentage, and not a step later."""
    for num_steps in (10, 50, 100, 1000):
        for percent in range(1, 100):
            flat = int(num_steps - Fraction(percent, 100) * num_steps)
            for warmup in (flat, flat + 1):
                run = RunConfig(
                    "x",
                    ModelConfig("attn", 32),
                    DataConfig("x"),
                    schedule=ScheduleConfig(kind, warmup, decay_fraction=percent / 100),
                    train=TrainConfig(num_steps),
                )
                if warmup == flat:
                    check_run_config(run, "here")
                    continue
                with pytest.raises(
                    ConfigError, match=f"of the {num_steps} steps; expected at most {flat},"
                ):
                    check_run_config(run, "here")


def test_a_step_does_not_depend_on_the_others():
    config = ScheduleConfig(kind="wsd")
    assert learning_rate(config, 1.0, 950, 1000) == learning_rate(config, 1.0, 950, 1000)
    assert learning_rate(ScheduleConfig(warmup_steps=0), 1.0, 0, 10) == 1.0
