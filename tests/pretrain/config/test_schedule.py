from __future__ import annotations

import math

import pytest

from pretrain.config import DECAYS, SCHEDULES, ScheduleConfig
from pretrain.config.schedule import learning_rate


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


def test_a_step_does_not_depend_on_the_others():
    config = ScheduleConfig(kind="wsd")
    assert learning_rate(config, 1.0, 950, 1000) == learning_rate(config, 1.0, 950, 1000)
    assert learning_rate(ScheduleConfig(warmup_steps=0), 1.0, 0, 10) == 1.0
